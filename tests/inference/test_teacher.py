import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from clipmini.inference import teacher
from clipmini.inference.embed import DualEncoder, load_model
from clipmini.inference.teacher import TeacherEmbeddings, embed_with_teacher
from modeling_clipmini.images_clipmini import ImageError, read_image

HALF = {"rtol": 0, "atol": 2**-11}  # the spacing of float16 below 1


@pytest.fixture(scope="module")
def made(tiny_folder, toy_pairs, tmp_path_factory):
    """A file of the tiny model's embeddings of the toy pairs; read only."""
    path = tmp_path_factory.mktemp("teacher") / "embeddings.parquet"
    embed_with_teacher(tiny_folder, toy_pairs, path)
    return path


def with_captions(pairs, row, captions):
    return type(pairs).from_list(
        [{**item, "captions": captions if index == row else item["captions"]} for index, item in enumerate(pairs)],
        features=pairs.features,
    )


def test_a_clipmini_folder_teaches_what_it_embeds(made, tiny_folder, toy_pairs):
    encoder = DualEncoder(load_model(tiny_folder, "cpu"))
    images = encoder.encode_images(toy_pairs["image"])
    texts = encoder.encode_texts([text for captions in toy_pairs["captions"] for text in captions])
    embeddings = TeacherEmbeddings.load(made, toy_pairs)
    assert embeddings.logit_scale == pytest.approx(encoder.logit_scale)
    for row in range(12):
        for caption in range(2):
            image, text = embeddings.rows(row, caption)
            assert image.dtype == text.dtype == torch.float32
            torch.testing.assert_close(image, images[row], **HALF)
            torch.testing.assert_close(text, texts[2 * row + caption], **HALF)


def test_a_teacher_that_was_trained_further_teaches_anew(tiny_folder, toy_pairs, tmp_path):
    folder, pairs = tmp_path / "model", toy_pairs.select([0, 1])
    shutil.copytree(tiny_folder, folder)
    embed_with_teacher(folder, pairs, tmp_path / "before.parquet")
    model = load_model(folder, "cpu")
    with torch.no_grad():
        for projection in (model.visual_projection, model.text_projection):
            next(projection.parameters()).neg_()
    model.save_pretrained(folder)
    embed_with_teacher(folder, pairs, tmp_path / "after.parquet")
    before, after = (TeacherEmbeddings.load(tmp_path / f"{name}.parquet", pairs) for name in ("before", "after"))
    torch.testing.assert_close(after.images, -before.images)
    torch.testing.assert_close(after.texts, -before.texts)


def test_clip_teaches_what_it_embeds(clip_folder, toy_pairs, tmp_path):
    embed_with_teacher(clip_folder, toy_pairs, tmp_path / "clip.parquet")
    embeddings = TeacherEmbeddings.load(tmp_path / "clip.parquet", toy_pairs)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    row = toy_pairs[7]
    inputs = processor(
        images=read_image(row["image"]), text=row["captions"][1], truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**inputs)
    image, text = embeddings.rows(7, 1)
    torch.testing.assert_close(image, expected.image_embeds[0], **HALF)
    torch.testing.assert_close(text, expected.text_embeds[0], **HALF)
    assert embeddings.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_the_file_is_as_described(made, tiny_folder):
    table = pq.read_table(made)
    vector = pa.list_(pa.float16(), 16)
    assert table.schema.names == ["image_id", "image_embedding", "text_embeddings", "captions_hash"]
    assert [table.schema.field(index).type.id for index in range(2)] == [pa.int64().id, vector.id]
    assert table.schema.field("image_embedding").type.list_size == 16
    assert table.schema.field("image_embedding").type.value_type == pa.float16()
    assert table["image_id"].to_pylist() == list(range(12))
    assert [len(texts) for texts in table["text_embeddings"].to_pylist()] == [2] * 12
    lengths = np.linalg.norm(np.array(table["image_embedding"].to_pylist(), dtype=np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-3)
    about = json.loads(table.schema.metadata[b"clipmini_teacher"])
    assert about == {"name": tiny_folder.parent.name, "logit_scale": pytest.approx(1 / 0.07, rel=1e-4)}
    assert [file.name for file in made.parent.iterdir()] == [made.name]


def test_groups_and_splits_make_one_file_that_serves_each_split(tiny_folder, made, toy_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "ROWS_PER_CHUNK", 3)
    uneven = with_captions(toy_pairs, 4, ["a", "green disc", "a disc, green"])
    path = tmp_path / "new" / "embeddings.parquet"
    embed_with_teacher(tiny_folder, uneven, path)
    assert pq.ParquetFile(path).num_row_groups == 4
    whole = TeacherEmbeddings.load(made, toy_pairs)
    for split in (uneven.select(range(7)), uneven.select(range(7, 12))):
        shuffled = split.shuffle(seed=1)
        embeddings = TeacherEmbeddings.load(path, shuffled)
        assert len(embeddings.images) == len(split)
        for row, item in enumerate(shuffled):
            for caption, text in enumerate(item["captions"]):
                image, embedding = embeddings.rows(row, caption)
                torch.testing.assert_close(image, whole.rows(item["image_id"], 0)[0], **HALF)
                if text in toy_pairs[item["image_id"]]["captions"]:
                    torch.testing.assert_close(embedding, whole.rows(item["image_id"], caption)[1], **HALF)


def test_copies_that_share_an_id_are_told_apart_by_their_captions(tiny_folder, toy_pairs, tmp_path):
    shared = toy_pairs.map(lambda row: {**row, "image_id": min(row["image_id"], 10)}, features=toy_pairs.features)
    embed_with_teacher(tiny_folder, shared, tmp_path / "shared.parquet")
    one, other = (
        TeacherEmbeddings.load(tmp_path / "shared.parquet", shared.select(rows)) for rows in ((10, 11), (11, 10))
    )
    assert torch.equal(one.images, other.images.flip(0))
    assert not torch.equal(one.images[0], one.images[1])


def test_images_that_share_id_and_captions_keep_their_own_embeddings(tiny_folder, made, toy_pairs, tmp_path):
    same = {"captions": ["a shape"], "image_id": 3}
    shared = toy_pairs.map(lambda row: {**row, **same}, features=toy_pairs.features)
    embed_with_teacher(tiny_folder, shared, tmp_path / "shared.parquet")
    images = TeacherEmbeddings.load(tmp_path / "shared.parquet", shared).images
    assert torch.equal(images, TeacherEmbeddings.load(made, toy_pairs).images)


def test_another_logit_scale_can_be_given(tiny_folder, toy_pairs, tmp_path):
    pairs = toy_pairs.select([0])
    embed_with_teacher(tiny_folder, pairs, tmp_path / "scaled.parquet", logit_scale=20.0)
    assert TeacherEmbeddings.load(tmp_path / "scaled.parquet", pairs).logit_scale == 20.0


def test_a_file_is_replaced_on_request_alone(tiny_folder, toy_pairs, tmp_path):
    path, pairs = tmp_path / "embeddings.parquet", toy_pairs.select([0])
    path.write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        embed_with_teacher(tiny_folder, pairs, path)
    assert path.read_text() == "mine"
    embed_with_teacher(tiny_folder, pairs, path, overwrite=True)
    assert len(TeacherEmbeddings.load(path, pairs).images) == 1


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a red square", "square in blue"], "other captions of image_id 0"),
        (["square in red", "a red square"], "other captions of image_id 0"),
        (["a red square"], "other captions of image_id 0"),
        (["a red square", "square in red", "red"], "other captions of image_id 0"),
    ],
)
def test_other_captions_are_found_out(made, toy_pairs, captions, message):
    with pytest.raises(ValueError, match=message):
        TeacherEmbeddings.load(made, with_captions(toy_pairs, 0, captions))


def test_an_image_that_the_teacher_has_not_seen_is_named(made, toy_pairs):
    others = toy_pairs.map(lambda row: {**row, "image_id": row["image_id"] + 1}, features=toy_pairs.features)
    with pytest.raises(ValueError, match="no embeddings of image_id 12"):
        TeacherEmbeddings.load(made, others.select([11]))


def test_what_is_no_such_file_is_named(tmp_path, toy_pairs):
    with pytest.raises(ValueError, match=r"none\.parquet"):
        TeacherEmbeddings.load(tmp_path / "none.parquet", toy_pairs)
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"text\.parquet cannot be read"):
        TeacherEmbeddings.load(tmp_path / "text.parquet", toy_pairs)
    pq.write_table(pa.table({"image_id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet does not hold"):
        TeacherEmbeddings.load(tmp_path / "other.parquet", toy_pairs)


@pytest.mark.parametrize(
    ("image", "name"), [({"bytes": b"no image", "path": None}, "image_id 1:"), ("missing.jpg", r"missing\.jpg:")]
)
def test_a_image_that_cannot_be_read_is_named_and_leaves_nothing(
    tiny_folder, toy_pairs, tmp_path, monkeypatch, image, name
):
    monkeypatch.setattr(teacher, "ROWS_PER_CHUNK", 1)  # the first group is on disk when the second fails
    rows = [toy_pairs[0], {**toy_pairs[1], "image": image}]
    pairs = type(toy_pairs).from_list(rows, features=toy_pairs.features)
    with pytest.raises(ImageError, match=name):
        embed_with_teacher(tiny_folder, pairs, tmp_path / "embeddings.parquet")
    assert not list(tmp_path.iterdir())


def test_teachers_that_cannot_teach_are_named(tmp_path, toy_pairs):
    out = tmp_path / "out" / "embeddings.parquet"
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        embed_with_teacher(tmp_path / "nowhere", toy_pairs, out)
    assert not out.exists()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_arguments_are_named(tiny_folder, toy_pairs, tmp_path, scale):
    with pytest.raises(ValueError, match="logit_scale"):
        embed_with_teacher(tiny_folder, toy_pairs, tmp_path / "out.parquet", logit_scale=scale)
    with pytest.raises(ValueError, match="no pairs"):
        embed_with_teacher(tiny_folder, toy_pairs.select([]), tmp_path / "out.parquet")
