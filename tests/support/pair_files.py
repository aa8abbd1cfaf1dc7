"""Files of images and captions that tests write; import as `pair_files`."""

import csv
import io
import json

from PIL import Image

WHOLE = {"validation_fraction": 0, "test_fraction": 0}
TOLERANT = {**WHOLE, "max_skipped": 1}


def color_of(number):
    return (number % 256, number * 7 % 256, number * 31 % 256)


def encode(number=0):
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), color_of(number)).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        (folder / f"{number}.png").write_bytes(encode(number))
    return folder


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path
