"""The FID Inception network in PyTorch, from the list of its layers and under torchvision's names.

Shares no code with dar_jax. A branch is a list of (name, channels, kernel height, kernel width, stride, padded).
"""

import torch
import torch.nn.functional as F
from torch import nn

STEM = [("Conv2d_1a_3x3", 3, 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 32, 3, 1, 0), ("Conv2d_2b_3x3", 32, 64, 3, 1, 1)]
STEM_2 = [("Conv2d_3b_1x1", 64, 80, 1, 1, 0), ("Conv2d_4a_3x3", 80, 192, 3, 1, 0)]


class ConvNorm(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


def average_pool(x):
    ones = torch.ones_like(x[:1, :1])
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=True) / F.avg_pool2d(ones, 3, 1, 1, count_include_pad=True)


class Mixed(nn.Module):
    """Branches side by side; each is a chain of convolutions, of which the last may be a pair on one input."""

    def __init__(self, inputs, branches, pool=None, pooled=None):
        super().__init__()
        self.names, self.pool, self.pooled, self.outputs = [], pool, pooled, 0
        for branch in branches:
            width, names = inputs, []
            for step in branch:
                pair = step if isinstance(step, list) else [step]
                for name, channels, height, breadth, *rest in pair:
                    stride, padding = (2, 0) if rest else (1, (height // 2, breadth // 2))
                    self.add_module(name, ConvNorm(width, channels, (height, breadth), stride, padding))
                names.append([name for name, *_ in pair])
                width = sum(channels for _, channels, *_ in pair)
            self.names.append(names)
            self.outputs += width
        if pooled:
            self.branch_pool = ConvNorm(inputs, pooled, 1)
        self.outputs += pooled or inputs

    def forward(self, x):
        outputs = []
        for names in self.names:
            h = x
            for group in names:
                h = torch.cat([getattr(self, name)(h) for name in group], 1)
            outputs.append(h)
        pooled = self.pool(x)
        outputs.append(self.branch_pool(pooled) if self.pooled else pooled)
        return torch.cat(outputs, 1)


def max_pool(stride, padding):
    return lambda x: F.max_pool2d(x, 3, stride, padding)


def block_a(inputs, pooled):
    one = [("branch1x1", 64, 1, 1)]
    five = [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)]
    three = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)]
    return Mixed(inputs, [one, five, three], average_pool, pooled)


def block_b(inputs):
    three = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3, "half")]
    return Mixed(inputs, [[("branch3x3", 384, 3, 3, "half")], three], max_pool(2, 0))


def block_c(inputs, width):
    one = [("branch1x1", 192, 1, 1)]
    seven = [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, 1, 7), ("branch7x7_3", 192, 7, 1)]
    double = [("branch7x7dbl_1", width, 1, 1), ("branch7x7dbl_2", width, 7, 1), ("branch7x7dbl_3", width, 1, 7)]
    double += [("branch7x7dbl_4", width, 7, 1), ("branch7x7dbl_5", 192, 1, 7)]
    return Mixed(inputs, [one, seven, double], average_pool, 192)


def block_d(inputs):
    three = [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3, "half")]
    seven = [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1)]
    return Mixed(inputs, [three, [*seven, ("branch7x7x3_4", 192, 3, 3, "half")]], max_pool(2, 0))


def block_e(inputs, pool):
    one = [("branch1x1", 320, 1, 1)]
    three = [("branch3x3_1", 384, 1, 1), [("branch3x3_2a", 384, 1, 3), ("branch3x3_2b", 384, 3, 1)]]
    double = [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3)]
    double += [[("branch3x3dbl_3a", 384, 1, 3), ("branch3x3dbl_3b", 384, 3, 1)]]
    return Mixed(inputs, [one, three, double], pool, 192)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        for name, *sizes in STEM + STEM_2:
            self.add_module(name, ConvNorm(*sizes))
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, average_pool)
        self.Mixed_7c = block_e(2048, max_pool(1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        """[B, 3, 299, 299] -> pool, spatial in (row, column, channel) order, logits without bias."""
        for name, *_ in STEM:
            x = getattr(self, name)(x)
        x = F.max_pool2d(x, 3, 2)
        for name, *_ in STEM_2:
            x = getattr(self, name)(x)
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = x.flatten(2).mean(2)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


def random_inception(seed=0):
    """The network in evaluation mode with weights under which activations neither die nor grow."""
    torch.manual_seed(seed)
    net = Inception().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.7, 1.4)
    return net
