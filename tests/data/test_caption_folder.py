"""Folders of captioned images: what they give, and every way in which they can be wrong."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dar_jax.config import default
from dar_jax.data.captions import to_sample, with_captions_of
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.evaluation.in_training import check_evaluation


def write_captions(root, captions, size=(8, 8), split="train"):
    """Image i is of the grey value 10 + i, its side or (height, width) `size`; returns the folder of the split."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, caption in enumerate(captions):
        height, width = size[i] if isinstance(size, list) else size
        Image.fromarray(np.full((height, width, 3), 10 + i, np.uint8)).save(folder / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def captions_config(root):
    config = default()
    config.data.update(source="captions", path=str(root))
    config.model.update(family="mmdit", text_length=3)
    return config


def open_split(root, split="train"):
    return open_source(captions_config(root).data, split)


def test_images_and_captions_in_the_order_of_the_lines(tmp_path):
    folder = write_captions(tmp_path, ["a red heart", "größe ☂"], [(8, 6), (5, 9)])
    (folder / "more").mkdir()
    Image.new("L", (3, 2), 77).save(folder / "more" / "x.PNG")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "./more/x.PNG", "caption": "second", "width": 3}\n')
        file.write('{"file_name": "000.png", "text": "again"}')
    for ignored in ("notes.txt", ".hidden.png"):
        (folder / ignored).write_bytes(b"")
    source = pickle.loads(pickle.dumps(open_split(tmp_path)))
    assert (len(source), source.num_classes) == (4, 1)
    assert source.captions == ["a red heart", "größe ☂", "second", "again"]
    examples = [source[i] for i in range(4)]
    assert [(int(e["image"].flat[0]), e["label"], e["caption"]) for e in examples] == [
        (10, 0, "a red heart"),
        (11, 0, "größe ☂"),
        (77, 0, "second"),
        (10, 0, "again"),
    ]
    assert [source.image_size(i) for i in range(4)] == [e["image"].shape[:2] for e in examples]
    assert open_split(folder, ".").captions == source.captions


def line(**entry):
    return json.dumps(entry) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'file_name': 'a.png'}\n", r"metadata\.jsonl. line 2 is no JSON"),
        ("[1]\n", "line 2 is no JSON object"),
        (b"\xff\n", "line 2 is no JSON"),
        (line(text="x"), 'line 2 has no string "file_name"'),
        (line(file_name="000.png"), 'line 2 has no string "text" or "caption"'),
        (line(file_name="000.png", text=["x"]), 'line 2 has no string "text" or "caption"'),
        (line(file_name="9.png", text="x"), 'line 2 names "9.png", which is no file'),
        (line(file_name="pipe.png", text="x"), 'line 2 names "pipe.png", which is no file'),
        (line(file_name="a/../../000.png", text="x"), r'line 2: file_name = "a/\.\./\.\./000.png" leaves its folder'),
        (line(file_name="/etc/passwd", text="x"), "leaves its folder"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, message):
    folder = write_captions(tmp_path, ["good"])
    os.mkfifo(folder / "pipe.png")
    with open(folder / "metadata.jsonl", "ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        open_split(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    folder = write_captions(tmp_path, ["one", "two"])
    for name in ("b.jpg", "a.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=r'2 images of .* have no caption in metadata\.jsonl, "a\.png" is the first'):
        open_split(tmp_path)
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"metadata\.jsonl. has no lines"):
        open_split(tmp_path)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r'train. has no metadata\.jsonl; write it, .* "text"'):
        open_split(tmp_path)
    with pytest.raises(UserError, match='Did you mean "train"'):
        open_split(tmp_path, "trian")


def test_words_and_what_is_sampled(tmp_path):
    write_captions(tmp_path, ["red heart", "tiger", "red tiger"])
    write_captions(tmp_path, ["tiger heart", "red whale"], split="test")
    config = captions_config(tmp_path)
    config = with_captions_of(open_split(tmp_path), config)
    assert config.model.words == ("red", "tiger", "heart")
    wanted = to_sample(config, 3)
    assert wanted.captions == ["tiger heart", "red whale", "tiger heart"] and not wanted.attributes
    np.testing.assert_array_equal(wanted.condition["words"], [[3, 4, 0], [2, 0, 0], [3, 4, 0]])


def test_an_evaluation_knows_before_the_run_what_it_lacks(tmp_path):
    write_captions(tmp_path, ["red"])
    write_captions(tmp_path, ["red red red red"], split="test")
    config, source = captions_config(tmp_path), open_split(tmp_path)
    with pytest.raises(UserError, match=r"source = captions have no classes, which fd_convnet needs; set .*inception"):
        check_evaluation(config, source)
    config.eval.num_samples = 0
    with pytest.raises(UserError, match='text_length = 3, but the caption "red red red red" has 4 words'):
        check_evaluation(config, source)
    config.model.text_length = 4
    check_evaluation(config, source)
