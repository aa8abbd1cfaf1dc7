"""One class for each library that `peers.py` compares: it saves, loads, trains and embeds as its documentation says.

All of them have the same two towers with the same weights (EfficientNet-Lite0 and MiniLM-L6), see 256x256 pixels, and
average the tokens of a caption; those with linear projections have the same projections too, so that their embeddings
agree, which `peers.py` checks. Libraries are imported where they are used: each contender runs in a process of its
own, and its time to load includes its imports and no other's.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

EDGE, WIDTH, VISION_WIDTH, TEXT_WIDTH = 256, 512, 1280, 384
MEAN = STD = (0.5, 0.5, 0.5)  # of EfficientNet-Lite0
VISION, TEXT, BERT, PROJECTIONS = "vision", "text", "bert", "projections.pt"
Files = Sequence[Path]
AfterStep = Callable[[], Any]


def save_towers(folder: Path) -> None:
    """Save what all contenders start from: both towers, and projections that are drawn once.

    The text tower is saved as DistilBERT and as the BERT that it was made of, since open_clip takes no DistilBERT.
    """
    from clipmini.training.offline_towers import OFFLINE_TOWERS, resolve_tower

    shutil.copytree(resolve_tower("offline:tf_efficientnet_lite0"), folder / VISION)
    config_file = folder / VISION / "config.json"
    config = json.loads(config_file.read_text())
    config["pretrained_cfg"] |= {"input_size": [3, EDGE, EDGE], "crop_pct": 1.0}
    config_file.write_text(json.dumps(config))
    shutil.copytree(resolve_tower("offline:minilm-l6"), folder / TEXT)
    tower = OFFLINE_TOWERS["minilm-l6"]
    weights = Path(str(metadata.distribution(tower.distribution).locate_file(tower.weight_file)))
    (folder / BERT).mkdir()
    shutil.copy(weights, folder / BERT / "model.safetensors")
    shutil.copy(weights.parent / "config.json", folder / BERT / "config.json")
    for file in (folder / TEXT).glob("*token*"):
        shutil.copy(file, folder / BERT)
    torch.manual_seed(0)
    projections = {
        side: torch.randn(WIDTH, width) / width**0.5 for side, width in (("image", VISION_WIDTH), ("text", TEXT_WIDTH))
    }
    torch.save(projections, folder / PROJECTIONS)


def project(towers: Path, image: nn.Linear, text: nn.Linear) -> None:
    """Give two linear layers the projections that all contenders share."""
    projections = torch.load(towers / PROJECTIONS, weights_only=True)
    with torch.no_grad():
        image.weight.copy_(projections["image"])
        text.weight.copy_(projections["text"])


def in_batches(items: Sequence[Any], batch_size: int, embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    """Embed items batch by batch, without gradients, as rows of length 1."""
    with torch.inference_mode():
        batches = [embed(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    return F.normalize(torch.cat(batches), dim=1)


def mean_of_tokens(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Average token states that are not padding: (N, L, W) to (N, W)."""
    mask = attention_mask[:, :, None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


class Contender:
    """A dual encoder in some library. `folder` is where `save` left it."""

    name: str
    package: str
    how: str  # it is used, in a line
    batch_sizes = (4, 32)  # of encoding, where the library leaves it to its user: the faster one counts

    @staticmethod
    def save(towers: Path, folder: Path) -> None:
        """Build the untrained model from its towers, and save it as its library does."""
        raise NotImplementedError

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    def embed_images(self, files: Files, batch_size: int) -> Tensor:
        """Embed image files: (N, width), rows of length 1."""
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """Embed captions: (N, width), rows of length 1."""
        raise NotImplementedError

    def train(
        self, files: Files, captions: Sequence[str], batch_size: int, after_step: AfterStep, folder: Path
    ) -> None:
        """Train both towers for one epoch."""
        raise NotImplementedError


def trainer_options(batch_size: int, folder: Path) -> dict[str, Any]:
    """Return the arguments that the three Trainers get: the batch, one epoch on the CPU, and no files."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "dataloader_drop_last": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def stepwise(after_step: AfterStep) -> Any:
    """Make a callback of Trainer."""
    from transformers import TrainerCallback

    class Stepwise(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    return Stepwise()


class ClipMini(Contender):
    """clipmini, as `clipmini train` and `clipmini.load` use it."""

    name, package = "clipmini", "clipmini"
    how = "`ClipMiniTrainer` with its defaults, and freed memory kept, as `clipmini train` does; `encode_files`"
    batch_sizes = ()  # its own

    @staticmethod
    def save(towers: Path, folder: Path) -> None:
        from clipmini.publishing.folder import save_model_folder
        from clipmini.training.build import ModelPreset, build_model

        preset = ModelPreset(
            vision=str(towers / VISION),
            text=str(towers / TEXT),
            pretrained_cfg={"input_size": [3, EDGE, EDGE], "crop_pct": 1.0},
            config={"projection_dim": WIDTH, "projection": "linear", "text_pooling": "mean"},
        )
        model = build_model(preset)
        project(towers, model.visual_projection, model.text_projection)
        save_model_folder(model, folder)

    def __init__(self, folder: Path) -> None:
        import clipmini
        from clipmini.inference.embed import DualEncoder

        self.model = clipmini.load(folder, device="cpu")
        self.encoder = DualEncoder(self.model)

    def embed_images(self, files: Files, batch_size: int) -> Tensor:
        return self.encoder.encode_files(files)[1]

    def embed_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        return self.model.encode_text(list(texts), convert_to_tensor=True)

    def train(
        self, files: Files, captions: Sequence[str], batch_size: int, after_step: AfterStep, folder: Path
    ) -> None:
        from datasets import Dataset

        from clipmini.inference.embed import keep_freed_memory
        from clipmini.training.arguments import ClipMiniTrainingArguments
        from clipmini.training.trainer import ClipMiniTrainer

        keep_freed_memory()
        rows = [
            {"image": {"bytes": None, "path": str(file)}, "captions": [caption], "image_id": number}
            for number, (file, caption) in enumerate(zip(files, captions, strict=True))
        ]
        args = ClipMiniTrainingArguments(**trainer_options(batch_size, folder))
        ClipMiniTrainer(self.model, args, Dataset.from_list(rows), callbacks=[stepwise(after_step)]).train()


class Bare(Contender):
    """The towers alone, in the fastest plain PyTorch that computes the same: what any library has to pay."""

    name, package = "bare towers", "torch"
    how = "a plain loop: channels last, BatchNorm statistics frozen as clipmini freezes them, freed memory kept"

    @staticmethod
    def save(towers: Path, folder: Path) -> None:
        shutil.copytree(towers, folder)

    def __init__(self, folder: Path) -> None:
        import timm
        from transformers import AutoModel, AutoTokenizer

        config = json.loads((folder / VISION / "config.json").read_text())["pretrained_cfg"]
        self.vision = timm.create_model(f"local-dir:{folder / VISION}", pretrained=True, num_classes=0).eval()
        self.vision = self.vision.to(memory_format=torch.channels_last)
        keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
        self.transform = timm.data.create_transform(**{key: config[key] for key in keys})
        self.text, self.tokenizer = (kind.from_pretrained(folder / TEXT) for kind in (AutoModel, AutoTokenizer))
        self.text.eval()
        self.image_projection = nn.Linear(VISION_WIDTH, WIDTH, bias=False)
        self.text_projection = nn.Linear(TEXT_WIDTH, WIDTH, bias=False)
        project(folder, self.image_projection, self.text_projection)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def pixels(self, files: Files) -> Tensor:
        """Read and prepare images: (N, 3, height, width)."""
        batch = torch.stack([self.transform(Image.open(file).convert("RGB")) for file in files])
        return batch.contiguous(memory_format=torch.channels_last)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Embed prepared images, before normalization."""
        return self.image_projection(self.vision(pixels))

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Tokenize and embed captions, before normalization."""
        inputs = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        hidden = self.text(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return self.text_projection(mean_of_tokens(hidden, inputs["attention_mask"]))

    def embed_images(self, files: Files, batch_size: int) -> Tensor:
        return in_batches(files, batch_size, lambda batch: self.image_features(self.pixels(batch)))

    def embed_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        longest_first = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        embeds = in_batches([texts[index] for index in longest_first], batch_size, self.text_features)
        return torch.empty_like(embeds).index_copy_(0, torch.tensor(longest_first), embeds)

    def train(
        self, files: Files, captions: Sequence[str], batch_size: int, after_step: AfterStep, folder: Path
    ) -> None:
        from clipmini.inference.embed import keep_freed_memory

        keep_freed_memory()
        modules = nn.ModuleList([self.vision, self.text, self.image_projection, self.text_projection]).train()
        for module in self.vision.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.AdamW([*modules.parameters(), self.logit_scale], lr=5e-5, fused=True)
        labels = torch.arange(batch_size)
        for start in range(0, len(files), batch_size):
            rows = slice(start, start + batch_size)
            image = F.normalize(self.image_features(self.pixels(files[rows])), dim=1)
            text = F.normalize(self.text_features(captions[rows]), dim=1)
            logits = self.logit_scale.exp() * image @ text.T
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after_step()


class OpenClip(Contender):
    """open_clip: a `CustomTextCLIP` of a timm and a Hugging Face tower, trained by its own `train_one_epoch`."""

    name, package = "open_clip", "open_clip_torch"
    how = "its own `train_one_epoch`, transforms and tokenizer, which pads to 77 tokens; the text tower is the BERT"

    @staticmethod
    def save(towers: Path, folder: Path) -> None:
        import open_clip
        from open_clip.push_to_hf_hub import save_for_hf
        from open_clip.tokenizer import HFTokenizer
        from safetensors.torch import load_file

        bert = folder / BERT
        shutil.copytree(towers / BERT, bert)
        config = {
            "embed_dim": WIDTH,
            "vision_cfg": {"timm_model_name": "tf_efficientnet_lite0", "timm_proj": "linear", "image_size": EDGE},
            "text_cfg": {
                "hf_model_name": str(bert),
                "hf_tokenizer_name": str(bert),
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": "linear",
                "hf_model_pretrained": False,
            },
            "custom_text": True,
        }
        model = open_clip.CustomTextCLIP(WIDTH, config["vision_cfg"], config["text_cfg"], output_dict=True)
        weights = load_file(towers / VISION / "model.safetensors")
        model.visual.trunk.load_state_dict({k: v for k, v in weights.items() if not k.startswith("classifier")})
        missing, _ = model.text.transformer.load_state_dict(load_file(bert / "model.safetensors"), strict=False)
        assert not missing
        project(towers, model.visual.head.proj, model.text.proj)
        model.visual.image_mean, model.visual.image_std = MEAN, STD
        save_for_hf(model, HFTokenizer(str(bert)), config, str(folder), safe_serialization=True)

    def __init__(self, folder: Path) -> None:
        import open_clip

        name = f"local-dir:{folder}"
        self.model, self.train_transform, self.transform = open_clip.create_model_and_transforms(
            name, output_dict=True
        )
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def embed_images(self, files: Files, batch_size: int) -> Tensor:
        def embed(batch: Files) -> Tensor:
            return self.model.encode_image(torch.stack([self.transform(Image.open(file)) for file in batch]))

        return in_batches(files, batch_size, embed)

    def embed_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        return in_batches(texts, batch_size, lambda batch: self.model.encode_text(self.tokenizer(list(batch))))

    def train(
        self, files: Files, captions: Sequence[str], batch_size: int, after_step: AfterStep, folder: Path
    ) -> None:
        import open_clip
        from open_clip_train import params, scheduler
        from open_clip_train.train import train_one_epoch

        options = f"--dataset-type csv --batch-size {batch_size} --workers 0 --precision fp32"
        args = params.parse_args([*options.split(), "--local-loss", "--gather-with-grad"])  # as its README advises
        # what open_clip_train.main sets
        vars(args).update(device="cpu", rank=0, world_size=1, distributed=False, distill=False, wandb=False)
        transform, tokenizer = self.train_transform, self.tokenizer

        class CsvPairs(torch.utils.data.Dataset):  # what open_clip_train.data.CsvDataset does, which needs webdataset
            def __len__(self) -> int:
                return len(files)

            def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
                return transform(Image.open(str(files[index]))), tokenizer([captions[index]])[0]

        loader: Any = torch.utils.data.DataLoader(CsvPairs(), batch_size=batch_size, shuffle=True, drop_last=True)
        loader.num_samples, loader.num_batches = len(files), len(loader)
        pairs = SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)
        # the parameter groups of open_clip_train.main
        named = list(self.model.named_parameters())
        no_decay = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
        rest = [p for _, p in named if not any(p is other for other in no_decay)]
        groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": rest, "weight_decay": args.wd}]
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)
        optimizer.register_step_post_hook(lambda *_: after_step())
        schedule = scheduler.cosine_lr(optimizer, args.lr, args.warmup, len(files) // batch_size)
        loss = open_clip.create_loss(args)
        train_one_epoch(self.model, {"train": pairs}, loss, 0, optimizer, None, schedule, None, args)


class SentenceTransformers(Contender):
    """sentence-transformers: two `Transformer` modules behind a `Router`, its way for towers of two modalities."""

    name, package = "sentence-transformers", "sentence-transformers"
    how = (
        "`SentenceTransformerTrainer`, `MultipleNegativesRankingLoss` in both directions; a `Router` over both towers"
    )
    batch_sizes = (4, 32)  # 32 is its default

    @staticmethod
    def save(towers: Path, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer

        # Without this the tower would hand over its feature maps, as if they were tokens.
        pooled: Any = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
        vision = Transformer(str(towers / VISION), modality_config=pooled, module_output_name="sentence_embedding")
        text = Transformer(str(towers / TEXT))
        image_dense, text_dense = (
            Dense(width, WIDTH, bias=False, activation_function=nn.Identity()) for width in (VISION_WIDTH, TEXT_WIDTH)
        )
        project(towers, image_dense.linear, text_dense.linear)
        router = Router(
            {"text": [text, Pooling(TEXT_WIDTH, "mean"), text_dense], "image": [vision, image_dense]},
            route_mappings={(None, "text"): "text", (None, "image"): "image"},
        )
        SentenceTransformer(modules=[router, Normalize()], device="cpu").save_pretrained(str(folder))

    def __init__(self, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(folder), device="cpu")

    def embed_images(self, files: Files, batch_size: int) -> Tensor:
        # not the files' names, which timm's image processor does not open
        return self._encode([Image.open(file).convert("RGB") for file in files], batch_size)

    def embed_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        return self._encode(list(texts), batch_size)

    def _encode(self, inputs: list[Any], batch_size: int) -> Tensor:
        return self.model.encode(inputs, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True)

    def train(
        self, files: Files, captions: Sequence[str], batch_size: int, after_step: AfterStep, folder: Path
    ) -> None:
        from datasets import Dataset
        from datasets import Image as ImageColumn
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        pairs = Dataset.from_dict({"query": list(captions), "document": list(map(str, files))})
        args = SentenceTransformerTrainingArguments(
            **trainer_options(batch_size, folder), router_mapping={"query": "text", "document": "image"}
        )
        # both directions, as the others have it
        directions: Any = ("query_to_doc", "doc_to_query")
        trainer = SentenceTransformerTrainer(
            self.model,
            args,
            pairs.cast_column("document", ImageColumn()),
            loss=MultipleNegativesRankingLoss(self.model, directions=directions, partition_mode="per_direction"),
            callbacks=[stepwise(after_step)],
        )
        trainer.train()


def wrapped_towers() -> tuple[Any, Any]:
    """Return towers that VisionTextDualEncoderModel takes, registered with transformers' Auto classes.

    It asks the config of a vision tower for `hidden_size`, which `TimmWrapperConfig` lacks, and a text tower for a
    pooled output and for `token_type_ids`, neither of which DistilBERT has. These two add just that.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        DistilBertConfig,
        DistilBertModel,
        TimmWrapperConfig,
        TimmWrapperModel,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class SizedTimmConfig(TimmWrapperConfig):
        model_type = "sized_timm"
        hidden_size: int = VISION_WIDTH

    class SizedTimm(TimmWrapperModel):
        config_class = SizedTimmConfig

    class PooledDistilBertConfig(DistilBertConfig):
        model_type = "pooled_distilbert"

    class PooledDistilBert(DistilBertModel):
        config_class = PooledDistilBertConfig

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, position_ids: Any = None, **_: Any
        ) -> BaseModelOutputWithPooling:
            hidden = super().forward(input_ids, attention_mask, position_ids=position_ids).last_hidden_state
            return BaseModelOutputWithPooling(hidden, mean_of_tokens(hidden, attention_mask))

    for config, model in ((SizedTimmConfig, SizedTimm), (PooledDistilBertConfig, PooledDistilBert)):
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
    return SizedTimm, PooledDistilBert


class VisionTextDualEncoder(Contender):
    """transformers' VisionTextDualEncoderModel, trained as its example `contrastive-image-text` does."""

    name, package = "VisionTextDualEncoder", "transformers"
    how = (
        "`Trainer` as in its example `contrastive-image-text`: images by torchvision, captions padded to 128 tokens; "
        "it takes neither tower as it is, so both are wrapped thinly"
    )

    @staticmethod
    def save(towers: Path, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

        vision_class, text_class = wrapped_towers()
        model = VisionTextDualEncoderModel(
            vision_model=vision_class.from_pretrained(towers / VISION),
            text_model=text_class.from_pretrained(towers / TEXT),
        )
        project(towers, model.visual_projection, model.text_projection)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(towers / TEXT).save_pretrained(folder)
        # timm's image processor cannot be saved by itself
        shutil.copytree(towers / VISION, folder / VISION, ignore=lambda *_: ["model.safetensors"])
        AutoImageProcessor.from_pretrained(folder / VISION)

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

        wrapped_towers()
        self.model = VisionTextDualEncoderModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder / VISION)

    def embed_images(self, files: Files, batch_size: int) -> Tensor:
        def embed(batch: Files) -> Tensor:
            images = [Image.open(file).convert("RGB") for file in batch]
            inputs = self.image_processor(images=images, return_tensors="pt")
            return self.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output

        return in_batches(files, batch_size, embed)

    def embed_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        def embed(batch: Sequence[str]) -> Tensor:
            inputs = self.tokenizer(list(batch), padding=True, truncation=True, return_tensors="pt")
            return self.model.get_text_features(**inputs).pooler_output

        return in_batches(texts, batch_size, embed)

    def train(
        self, files: Files, captions: Sequence[str], batch_size: int, after_step: AfterStep, folder: Path
    ) -> None:
        from datasets import Dataset
        from torchvision.io import ImageReadMode, read_image
        from torchvision.transforms import CenterCrop, ConvertImageDtype, InterpolationMode, Normalize, Resize
        from transformers import Trainer, TrainingArguments

        prepare = nn.Sequential(
            Resize([EDGE], interpolation=InterpolationMode.BICUBIC),
            CenterCrop(EDGE),
            ConvertImageDtype(torch.float),
            Normalize(MEAN, STD),
        )

        def read(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            images = [prepare(read_image(file, mode=ImageReadMode.RGB)) for file in rows["image"]]
            return {**rows, "pixel_values": images}

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            tokens = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
            return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), **tokens, "return_loss": True}

        tokens = self.tokenizer(list(captions), max_length=128, padding="max_length", truncation=True)
        pairs = Dataset.from_dict(
            {"image": list(map(str, files)), **{name: tokens[name] for name in ("input_ids", "attention_mask")}}
        )
        pairs.set_transform(read)
        args = TrainingArguments(
            **trainer_options(batch_size, folder), remove_unused_columns=False, learning_rate=5e-5, weight_decay=0.1
        )
        callbacks = [stepwise(after_step)]
        Trainer(self.model, args, data_collator=collate, train_dataset=pairs, callbacks=callbacks).train()


class TutorialHead(nn.Module):
    """The projection head of the tutorial: linear, GELU, linear, dropout, residual, LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 256), nn.Linear(256, 256)
        self.dropout, self.norm = nn.Dropout(0.1), nn.LayerNorm(256)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, width) to (N, 256)."""
        projected = self.first(features)
        return self.norm(projected + self.dropout(self.second(F.gelu(projected))))


class TutorialModel(nn.Module):
    """The model of the tutorial, with the class token of a caption and soft targets."""

    def __init__(self) -> None:
        super().__init__()
        import timm
        from transformers import DistilBertConfig, DistilBertModel

        self.vision = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="avg")
        text: Any = {"dim": TEXT_WIDTH, "n_layers": 6, "hidden_dim": 4 * TEXT_WIDTH, "sinusoidal_pos_embds": False}
        self.text = DistilBertModel(DistilBertConfig(**text))
        self.image_head, self.text_head = TutorialHead(VISION_WIDTH), TutorialHead(TEXT_WIDTH)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions: (N, 256)."""
        return self.text_head(self.text(input_ids, attention_mask).last_hidden_state[:, 0])

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        image = self.image_head(self.vision(batch["image"]))
        text = self.embed_texts(batch["input_ids"], batch["attention_mask"])
        logits = text @ image.T
        targets = F.softmax((image @ image.T + text @ text.T) / 2, dim=-1)
        losses = [
            -(goal * F.log_softmax(rows, -1)).sum(1) for rows, goal in ((logits, targets), (logits.T, targets.T))
        ]
        return ((losses[0] + losses[1]) / 2).mean()


class Tutorial(Contender):
    """The plain loop of Shariatnia's tutorial "Simple CLIP" (2021)."""

    name, package = "the tutorial's loop", "torch"
    how = "its model, loss and loop, both towers trained; images are read by PIL in place of OpenCV and albumentations"

    @staticmethod
    def save(towers: Path, folder: Path) -> None:
        from transformers import DistilBertModel

        shutil.copytree(towers / TEXT, folder)
        model = TutorialModel()
        from safetensors.torch import load_file

        weights = load_file(towers / VISION / "model.safetensors")
        model.vision.load_state_dict({k: v for k, v in weights.items() if not k.startswith("classifier")})
        model.text.load_state_dict(DistilBertModel.from_pretrained(towers / TEXT).state_dict())
        torch.save(model.state_dict(), folder / "best.pt")

    def __init__(self, folder: Path) -> None:
        from transformers import DistilBertTokenizer

        self.model = TutorialModel()
        self.model.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
        self.model.eval()
        self.tokenizer = DistilBertTokenizer.from_pretrained(folder)

    def _dataset(self, files: Files, captions: Sequence[str]) -> Any:
        import numpy as np

        encoded = self.tokenizer(list(captions), padding=True, truncation=True, max_length=200)

        class Pairs(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(files)

            def __getitem__(self, index: int) -> dict[str, Tensor]:
                item = {name: torch.tensor(encoded[name][index]) for name in ("input_ids", "attention_mask")}
                image = Image.open(files[index]).convert("RGB").resize((EDGE, EDGE), Image.Resampling.BILINEAR)
                pixels = (np.asarray(image, dtype=np.float32) / 255 - MEAN) / STD
                item["image"] = torch.tensor(pixels).permute(2, 0, 1).float()
                return item

        return Pairs()

    def embed_images(self, files: Files, batch_size: int) -> Tensor:
        loader = torch.utils.data.DataLoader(self._dataset(files, ["" for _ in files]), batch_size=batch_size)
        with torch.no_grad():
            embeds = [self.model.image_head(self.model.vision(batch["image"])) for batch in loader]
        return F.normalize(torch.cat(embeds), dim=1)

    def embed_texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        def embed(batch: Sequence[str]) -> Tensor:
            inputs = self.tokenizer(list(batch), padding=True, truncation=True, max_length=200, return_tensors="pt")
            return self.model.embed_texts(inputs["input_ids"], inputs["attention_mask"])

        return in_batches(texts, batch_size, embed)

    def train(
        self, files: Files, captions: Sequence[str], batch_size: int, after_step: AfterStep, folder: Path
    ) -> None:
        pairs = self._dataset(files, captions)
        loader = torch.utils.data.DataLoader(pairs, batch_size=batch_size, shuffle=True, num_workers=0)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-3)
        self.model.train()
        for batch in loader:
            loss = self.model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # it is shown at every step
            after_step()


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (ClipMini, Bare, SentenceTransformers, OpenClip, VisionTextDualEncoder, Tutorial)
}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
