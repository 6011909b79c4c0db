"""A folder of captioned images in the form of Hugging Face's imagefolder: metadata.jsonl, and images beside it.

A line of metadata.jsonl is {"file_name": "0001.png", "text": "a red heart"}, or has "caption" in place of "text".
Further keys are ignored, and so are empty lines. A file may lie in a sub folder, as "images/0001.png", and have several
captions, a line each.
"""

import json
import os
from typing import Any

from dar_jax.data.images import EXTENSIONS, decode_image, image_size
from dar_jax.errors import UserError

METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption")


class CaptionFolder:
    """Image files with captions in the order of metadata.jsonl, decoded when asked for. They have no labels: all are 0.

    Attributes:
      captions: of each image.
    """

    num_classes, has_captions = 1, True

    def __init__(self, root: str, files: list[str], captions: list[str]):
        self.root, self.files, self.captions = root, files, captions

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.files[index])
        return {"image": decode_image(path, path), "label": 0, "caption": self.captions[index]}

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from the head of its file. Raises UserError if that is damaged."""
        path = os.path.join(self.root, self.files[index])
        return image_size(path, path)


def open_caption_folder(root: str) -> CaptionFolder:
    """Opens the folder `root`.

    Raises UserError if metadata.jsonl is missing, one of its lines is damaged or names a file that is not there, or an
    image beside the captioned ones has no caption.
    """
    path = os.path.join(root, METADATA)
    if not os.path.isfile(path):
        raise UserError(
            f'"{root}" has no {METADATA}; write it, a line for each image: '
            '{"file_name": "0001.png", "text": "the caption"}.'
        )
    files, captions, seen = [], [], {}  # seen: the regular files of a sub folder
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                name, caption = _parse(line, f'"{path}" line {number}')
                folder, base = os.path.split(name)
                if folder not in seen:
                    seen[folder] = _regular_files(os.path.join(root, folder))
                if base not in seen[folder]:
                    raise UserError(
                        f'"{path}" line {number} names "{name}", which is no file of "{root}"; add it, or remove the '
                        "line."
                    )
                files.append(name)
                captions.append(caption)
    except OSError as error:
        raise UserError(f'"{path}" cannot be read ({error.strerror}); allow it.') from error
    if not files:
        raise UserError(f'"{path}" has no lines; write one for each image.')
    seen.setdefault("", _regular_files(root))
    images = {os.path.join(at, name) for at, names in seen.items() for name in names if _is_image(name)}
    if missing := sorted(images.difference(files)):
        raise UserError(
            f'{len(missing)} images of "{root}" have no caption in {METADATA}, "{missing[0]}" is the first; add lines '
            "for them, or move them elsewhere."
        )
    return CaptionFolder(root, files, captions)


def _parse(line: bytes, place: str) -> tuple[str, str]:
    """The normalised file name and the caption of a line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no JSON ({error}); repair it.") from error
    if not isinstance(entry, dict):
        raise UserError(f'{place} is no JSON object; write {{"file_name": ..., "text": ...}}.')
    name, caption = entry.get("file_name"), next((entry[key] for key in _CAPTION_KEYS if key in entry), None)
    for key, value in (("file_name", name), ('text" or "caption', caption)):
        if not isinstance(value, str):
            raise UserError(f'{place} has no string "{key}"; add it.')
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == ".." or "\0" in path:
        raise UserError(f'{place}: file_name = "{name}" leaves its folder; name a file below it.')
    return path, caption


def _regular_files(folder: str) -> set[str]:
    """The names of the regular files of a folder, links to such files too; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
