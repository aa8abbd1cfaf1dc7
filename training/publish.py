"""The model card: facts of a run, rendered into the folder that the Hub gets."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .build import ModelPreset
from .recipes import Recipe
from .towers import OFFLINE_PREFIX, OFFLINE_TOWERS

TEMPLATE = Path(__file__).parent.parent / "model_card.md"  # beside this package in a checkout and in a wheel alike


def render_model_card(recipe: Recipe, model_config: Any, results: dict[str, Any]) -> ModelCard:
    """Render the card of a trained model.

    Args:
        recipe: what was run.
        model_config: the model's `ClipMiniConfig`.
        results: as `results.json` holds them.

    Returns:
        The card, with metadata that the Hub reads.
    """
    towers: list[str] = []
    if not isinstance(recipe.model, ModelPreset):
        towers = [recipe.model]
    elif recipe.model.pretrained:
        towers = [recipe.model.vision, str(recipe.model.text)]
    base_model = [tower for tower in towers if not tower.startswith(OFFLINE_PREFIX) and not Path(tower).exists()]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "clipmini", "image-text-retrieval", "timm"],
        base_model=base_model or None,
        # No licence: of towers and pictures together only the person who trains can tell.
    )
    name = Path(str(recipe.training.output_dir)).name
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=name,
        model_id=f"your-name/{name}",
        vision=model_config.vision_config.architecture,
        text=towers[1] if len(towers) == 2 else model_config.text_config.model_type,
        projection_dim=model_config.projection_dim,
        loss=model_config.loss,
        data_source=recipe.data.source,
        frozen=_frozen(recipe),
        num_train_epochs=recipe.training.num_train_epochs,
        batch_size=recipe.training.per_device_train_batch_size,
        seed=recipe.training.seed,
        recipe=yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True),
        offline_towers=[
            OFFLINE_TOWERS[tower.removeprefix(OFFLINE_PREFIX)] for tower in towers if tower.startswith(OFFLINE_PREFIX)
        ],
        **results,
    )


def _frozen(recipe: Recipe) -> str:
    towers = {"vision tower": recipe.training.freeze_vision, "text tower": recipe.training.freeze_text}
    return " and ".join(name for name, is_frozen in towers.items() if is_frozen) or "nothing"
