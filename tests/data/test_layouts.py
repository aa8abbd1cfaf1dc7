"""Every layout that docs/data.md lists is read as it is, on a small example of its true shape."""

import base64
import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmini.data.images import Skipped
from clipmini.data.pairs import load_pairs
from modeling_clipmini.images_clipmini import read_image
from pair_files import WHOLE, color_of, encode, write_csv, write_images, write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
CAPTIONS = {0: ["zero", "nought"], 1: ["one"], 2: ["two"]}
ROWS = [(number, text) for number, texts in CAPTIONS.items() for text in texts]
EXPECTED = {color_of(number): texts for number, texts in CAPTIONS.items()}


def by_split(train=(), validation=(), test=()):
    splits = {"train": train, "validation": validation, "test": test}
    return {name: {color_of(n): CAPTIONS[n] for n in numbers} for name, numbers in splits.items() if numbers}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def coco(folder):
    """As the annotations of COCO 2017 lie when unpacked: boxes and key points beside the captions."""
    for split, numbers in {"train2017": [0, 2], "val2017": [1]}.items():
        images, annotations = [], []
        for number in numbers:
            name = f"{number:012d}.jpg"
            write(folder / split / name, encode(number))
            images.append(
                {"license": 3, "file_name": name, "coco_url": f"http://images/{name}", "height": 3, "width": 4}
                | {"date_captured": "2013-11-14 11:18:45", "flickr_url": "http://farm", "id": number + 1}
            )
            annotations += [
                {"image_id": number + 1, "id": 100 * number + k, "caption": text}
                for k, text in enumerate(CAPTIONS[number])
            ]
        start = {"info": {"year": 2017}, "licenses": [{"url": "u", "id": 1, "name": "n"}], "images": images}
        write(folder / f"annotations/captions_{split}.json", json.dumps(start | {"annotations": annotations}))
        boxes = [{"segmentation": [], "area": 1.5, "image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 18, "id": 9}]
        write(folder / f"annotations/instances_{split}.json", json.dumps(start | {"annotations": boxes}))
    return folder, by_split(train=[0, 2], validation=[1])


def karpathy(folder):
    """dataset_coco.json, whose rows name one of two folders."""
    rows = []
    for number, (place, split) in enumerate([("val2014", "test"), ("train2014", "train"), ("val2014", "restval")]):
        name = f"COCO_{place}_{number:012d}.jpg"
        write(folder / place / name, encode(number))
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": number, "sentid": k}
            for k, text in enumerate(CAPTIONS[number])
        ]
        ids = {"sentids": [0], "imgid": number, "cocoid": number + 7}
        rows.append({"filepath": place, "filename": name, "split": split, "sentences": sentences} | ids)
    write(folder / "dataset_coco.json", json.dumps({"images": rows, "dataset": "coco"}))
    return folder, by_split(train=[1, 2], test=[0])


def flickr8k(folder):
    """Images beside Flickr8k_text, with lemmas, ratings and official lists; one image is in no list."""
    text = folder / "Flickr8k_text"
    write_images(folder / "Flicker8k_Dataset", 4)
    rows = [*ROWS, (3, "three")]
    lines = "".join(f"{number}.png#{k}\t{caption}\n" for k, (number, caption) in enumerate(rows))
    write(text / "Flickr8k.token.txt", lines)
    write(text / "Flickr8k.lemma.token.txt", lines.replace("nought", "nothing"))
    write(text / "CrowdFlowerAnnotations.txt", "0.png\t1.png#2\t0\t0\t3\n")
    write(text / "ExpertAnnotations.txt", "0.png\t1.png#2\t1\t1\t1\n")
    write(text / "readme.txt", "If you use this data, please cite\n")
    for split, number in {"train": 0, "dev": 1, "test": 2}.items():
        write(text / f"Flickr_8k.{split}Images.txt", f"{number}.png\n")
    return folder, by_split([0], [1], [2])


def flickr30k(folder):
    """A token file beside a folder of images, without splits."""
    write_images(folder / "flickr30k-images", 3)
    lines = "".join(f"{number}.png#{k}\t{caption} \n" for k, (number, caption) in enumerate(ROWS))
    return write(folder / "results_20130124.token", lines).parent, None


def kaggle8k(folder):
    write_images(folder / "Images", 3)
    write(folder / "captions.txt", "image,caption\n" + "".join(f"{n}.png,{text} \n" for n, text in ROWS))
    return folder, None


def kaggle30k(folder):
    write_images(folder / "flickr30k_images", 3)
    lines = "".join(f"{number}.png| {k}| {text}\n" for k, (number, text) in enumerate(ROWS))
    write(folder / "results.csv", "image_name| comment_number| comment\n" + lines)
    return folder, None


def image_folder(folder):
    for split, number in {"train": 0, "validation": 1, "test": 2}.items():
        write(folder / split / f"{number}.png", encode(number))
        write_jsonl(
            folder / split / "metadata.jsonl",
            [{"file_name": f"{number}.png", "text": text} for text in CAPTIONS[number]],
        )
    return folder, by_split([0], [1], [2])


def text_files(folder):
    """A file of captions beside each image, a caption on each line."""
    for number, texts in CAPTIONS.items():
        write(folder / f"{number}.png", encode(number))
        write(folder / f"{number}.txt", "\n".join(texts) + "\n")
    return folder, None


def text_files_elsewhere(folder):
    """As CUB-200 has them: images and texts in two trees that are laid out alike."""
    for number, texts in CAPTIONS.items():
        name = f"{number + 1:03d}.Some_Bird/Some_Bird_{number}"
        write(folder / f"images/{name}.png", encode(number))
        write(folder / f"text_c10/{name}.txt", "\n".join(texts) + "\n")
    return folder, None


def json_files(folder):
    for number, texts in CAPTIONS.items():
        write(folder / f"{number}.png", encode(number))
        write(folder / f"{number}.json", json.dumps({"captions": texts, "width": 4}))
    return folder, None


def _shard(path, numbers):
    """A tar file as img2dataset writes it, with names that begin anew in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, number in enumerate(numbers):
            about = {"caption": CAPTIONS[number][0], "url": "http://a", "key": f"{key:09d}", "status": "success"}
            parts = {"png": encode(number), "json": json.dumps(about).encode()}
            for suffix, content in {**parts, "txt": "\n".join(CAPTIONS[number]).encode()}.items():
                member = tarfile.TarInfo(f"{key:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def webdataset(folder):
    for shard, numbers in {"00000": [0, 1], "00001": [2]}.items():
        _shard(folder / f"{shard}.tar", numbers)
        table = pa.table({"url": ["http://a"], "caption": ["zero"], "key": ["0"], "status": ["success"]})
        pq.write_table(table, folder / f"{shard}.parquet")
        write(folder / f"{shard}_stats.json", json.dumps({"count": 2, "successes": 2}))
    return folder, None


def webdataset_splits(folder):
    for shard, numbers in {"train-0000": [0, 1], "test-0000": [2]}.items():
        _shard(folder / f"{shard}.tar", numbers)
    return folder, by_split(train=[0, 1], test=[2])


def img2dataset_files(folder):
    for number, texts in CAPTIONS.items():
        stem = folder / f"0000{number}/{number:09d}"
        write(stem.with_suffix(".png"), encode(number))
        write(stem.with_suffix(".txt"), "\n".join(texts))
        write(stem.with_suffix(".json"), json.dumps({"caption": texts[0], "url": "http://a", "status": "success"}))
        table = pa.table({"url": ["http://a"], "caption": ["zero"], "key": ["0"], "status": ["success"]})
        pq.write_table(table, folder / f"0000{number}.parquet")
    return folder, None


def hub_parquet(folder):
    """A cloned repository with its images in parquet files, one for each split."""
    for split, number in {"train": 0, "validation": 1, "test": 2}.items():
        table = pa.table(
            {"image": [{"bytes": encode(number), "path": f"{number}.png"}], "caption": [CAPTIONS[number]]}
        )
        path = folder / f"data/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    write(folder / "README.md", "---\nlicense: mit\n---\n# Captions\n")
    return folder, by_split([0], [1], [2])


def hub_converted(folder):
    """As the Hub converts data sets: the configuration, then the split, are folders."""
    for split, number in {"train": 0, "test": 2}.items():
        path = folder / f"default/{split}/0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        structs = [{"bytes": encode(number), "path": None}]
        pq.write_table(pa.table({"image": structs, "caption": [CAPTIONS[number]]}), path)
    return folder, by_split(train=[0], test=[2])


def arrow_file(folder):
    write_images(folder, 3)
    table = pa.table({"image": [f"{n}.png" for n, _ in ROWS], "caption": [text for _, text in ROWS]})
    with pa.OSFile(str(folder / "pairs.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "pairs.arrow", None


def arrow_stream(folder):
    table = pa.table({"image": [encode(n) for n in CAPTIONS], "caption": list(CAPTIONS.values())})
    with pa.OSFile(str(folder / "pairs.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "pairs.arrow", None


def base64_tsv(folder):
    rows = [f"{n}\t{text}\t{base64.b64encode(encode(n)).decode()}" for n, text in ROWS]
    return write(folder / "pairs.tsv", "id\ttext\timage\n" + "\n".join(rows)), None


def archive_zip(folder):
    """A zip with a folder in it and what macOS adds."""
    with zipfile.ZipFile(folder / "pairs.zip", "w") as archive:
        archive.writestr("pairs/metadata.csv", "file_name,caption\n" + "".join(f"{n}.png,{t}\n" for n, t in ROWS))
        for number in CAPTIONS:
            archive.writestr(f"pairs/{number}.png", encode(number))
            archive.writestr(f"__MACOSX/pairs/._{number}.png", b"\0\5\26\7")
    return folder / "pairs.zip", None


def archive_tar_gz(folder):
    write(folder / "in/captions.csv", "image,caption\n" + "".join(f"{n}.png,{text}\n" for n, text in ROWS))
    write_images(folder / "in/images", 3)
    with tarfile.open(folder / "pairs.tar.gz", "w:gz") as tar:
        tar.add(folder / "in", ".")
    return folder / "pairs.tar.gz", None


def csv_gz(folder):
    write_images(folder, 3)
    text = "image,caption\n" + "".join(f"{n}.png,{text}\n" for n, text in ROWS)
    return write(folder / "pairs.csv.gz", gzip.compress(text.encode())), None


def excel(folder):
    """A sheet behind an empty one, with an unnamed column of numbers, as pandas writes it."""
    openpyxl = pytest.importorskip("openpyxl")
    write_images(folder, 3)
    book = openpyxl.Workbook()
    sheet = book.create_sheet("pairs")
    for row in [(None, "File Name", "Caption"), *((k, f"{n}.png", text) for k, (n, text) in enumerate(ROWS))]:
        sheet.append(row)
    book.save(folder / "pairs.xlsx")
    return folder / "pairs.xlsx", None


def excel_csv(folder):
    """As a German Excel saves CSV: semicolons, cp1252, a line for Excel itself."""
    write_images(folder / "Fotos", 3)
    text = "sep=;\r\nBild Nr;Image;Caption;Größe\r\n"
    text += "".join(f"{k};Fotos\\{n}.png;{caption};groß\r\n" for k, (n, caption) in enumerate(ROWS))
    return write(folder / "pairs.csv", text.encode("cp1252")), None


def unicode_text(folder):
    """As Excel saves Unicode text: UTF-16 with tabs."""
    write_images(folder, 3)
    text = "image\tcaption\r\n" + "".join(f"{n}.png\t{caption}\r\n" for n, caption in ROWS)
    return write(folder / "pairs.txt", text.encode("utf-16")), None


LONGER = {"train": {color_of(n): [f"a longer {text}" for text in texts] for n, texts in CAPTIONS.items()}}


def no_header(folder):
    write_images(folder, 3)
    return write(folder / "pairs.csv", "".join(f"{n}.png,a longer {text}\n" for n, text in ROWS)), LONGER


def json_values(folder):
    write_images(folder, 3)
    return write(folder / "a.json", json.dumps([[f"{n}.png", f"a longer {text}"] for n, text in ROWS])), LONGER


def numbered_columns(folder):
    write_images(folder, 3)
    header = ("image", "caption_0", "caption_1")
    rows = [(f"{n}.png", *texts, "")[:3] for n, texts in CAPTIONS.items()]
    return write_csv(folder / "pairs.csv", [header, *rows]), None


def equal_columns(folder):
    write_images(folder, 3)
    rows = [(f"{n}.png", *texts, "")[:3] for n, texts in CAPTIONS.items()]
    return write_csv(folder / "pairs.csv", [("image", "caption", "caption"), *rows]), None


def python_lists(folder):
    write_images(folder, 3)
    return write_csv(
        folder / "a.csv", [("image", "captions"), *((f"{n}.png", str(texts)) for n, texts in CAPTIONS.items())]
    ), None


def numpy_lists(folder):
    """As pandas writes a column of arrays: without commas."""
    write_images(folder, 3)
    rows = [(f"{n}.png", str(texts).replace(", ", "\n ")) for n, texts in CAPTIONS.items()]
    return write_csv(folder / "a.csv", [("image", "captions"), *rows]), None


def mapping(folder):
    write_images(folder / "images", 3)
    return write(folder / "captions.json", json.dumps({f"{n}.png": texts for n, texts in CAPTIONS.items()})), None


def pandas_json(orient):
    def make(folder):
        frame = pd.DataFrame({"image": [f"{n}.png" for n in CAPTIONS], "captions": list(CAPTIONS.values())})
        write_images(folder, 3)
        frame.to_json(folder / "pairs.json", orient=orient)
        return folder / "pairs.json", None

    return make


def windows_paths(folder):
    """Of another machine: a drive, backslashes, other case."""
    write_images(folder / "Bilder", 3)
    lines = "".join(f"C:\\Users\\a b\\Bilder\\{n}.PNG,{text}\r\n" for n, text in ROWS)
    return write(folder / "pairs.csv", "path,caption\r\n" + lines), None


def addresses_of_files(folder):
    write_images(folder / "my images", 3)
    uri = (folder / "my images").as_uri()
    return write_csv(folder / "a.csv", [("image", "caption"), *((f"{uri}/{n}.png", t) for n, t in ROWS)]), None


def leading_slash(folder):
    write_images(folder / "images", 3)
    rows = [(f"/images/{n}.png", text) for n, text in ROWS]
    return write_csv(folder / "a.csv", [("image", "caption"), *rows]), None


def other_suffix(folder):
    write_images(folder / "images", 3)
    return write_csv(folder / "a.csv", [("image", "caption"), *((f"{n}.JPEG", text) for n, text in ROWS)]), None


def ids(folder):
    """Numbers that a spreadsheet has robbed of their zeros."""
    for number in CAPTIONS:
        write(folder / f"images/{number + 1:06d}.png", encode(number))
    rows = [(str(n + 1), text) for n, text in ROWS]
    return write_csv(folder / "a.csv", [("image_id", "caption"), *rows]), None


def folder_column(folder):
    """Equal names in a folder for each class."""
    for number, name in enumerate(["cat", "dog", "fish"]):
        write(folder / f"images/{name}/1.png", encode(number))
    rows = [("1.png", ["cat", "dog", "fish"][n], text) for n, text in ROWS]
    return write_csv(folder / "a.csv", [("file_name", "class", "caption"), *rows]), None


def links(folder):
    """A link to a folder of images, and one to the folder above."""
    write_images(folder / "disk", 3)
    (folder / "set").mkdir()
    (folder / "set/images").symlink_to(folder / "disk")
    (folder / "set/loop").symlink_to(folder / "set")
    return write_csv(folder / "set/a.csv", [("image", "caption"), *((f"{n}.png", t) for n, t in ROWS)]), None


def composed_letters(folder):
    """A table in composed letters, files in decomposed ones, as macOS unpacks them."""
    for number in CAPTIONS:
        write(folder / f"images/cafe\u0301 {number}.png", encode(number))
    return write_csv(folder / "a.csv", [("image", "caption"), *((f"caf\xe9 {n}.png", t) for n, t in ROWS)]), None


def names_in_cp1252(folder):
    """A table and the names of files from the same Western Windows."""
    (folder / "images").mkdir()
    for number in CAPTIONS:
        Path(str(folder / "images" / "caf\udce9 ") + f"{number}.png").write_bytes(encode(number))
    text = "image,caption\n" + "".join(f"caf\xe9 {n}.png,{caption}\n" for n, caption in ROWS)
    return write(folder / "a.csv", text.encode("cp1252")), None


LAYOUTS = {
    "COCO": [coco],
    "Karpathy's JSON": [karpathy],
    "Flickr8k": [flickr8k, kaggle8k],
    "Flickr30k": [flickr30k, kaggle30k],
    "Image folder": [image_folder],
    "A file of captions for each image": [text_files, text_files_elsewhere, json_files, img2dataset_files],
    "WebDataset": [webdataset, webdataset_splits],
    "Hub repository": [hub_parquet, hub_converted],
    "Parquet and Arrow": [arrow_file, arrow_stream],
    "CSV": [excel_csv, unicode_text, no_header, csv_gz, numbered_columns, equal_columns, python_lists, numpy_lists],
    "Base64": [base64_tsv],
    "Excel": [excel],
    "JSON": [mapping, *map(pandas_json, ("records", "columns", "index", "split", "table")), json_values],
    "Archive": [archive_zip, archive_tar_gz],
    "Names of images": [
        *(windows_paths, addresses_of_files, leading_slash, other_suffix, ids, folder_column, links),
        *(composed_letters, names_in_cp1252),
    ],
}


def contents(pairs):
    """Map each image's color, split by split, to its captions."""
    return {
        split: {read_image(row["image"]).getpixel((0, 0)): row["captions"] for row in rows}
        for split, rows in pairs.items()
    }


class TestLayouts:
    @pytest.mark.parametrize("make", [make for makes in LAYOUTS.values() for make in makes], ids=lambda m: m.__name__)
    def test_is_read_without_options(self, make, tmp_path):
        source, expected = make(tmp_path)
        skipped = Skipped()
        pairs = load_pairs(source, **WHOLE, skipped=skipped)
        assert contents(pairs) == (expected or {"train": EXPECTED})
        assert skipped.items == []

    def test_is_listed(self):
        rows = re.findall(r"^\| \*\*(.+?)\*\* \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        assert rows == list(LAYOUTS)
