"""Diagnosis: what the layers of a trained model read, hand on and weigh, by depth and by noise level."""
