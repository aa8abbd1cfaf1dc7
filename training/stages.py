"""A timm tower by depth: its stages, the cached output of the frozen ones, and a learning rate for each parameter.

While the first stages of a tower are frozen, their output for an image never changes. Once it is computed, training
the other stages needs nothing else.
"""

import copy
import logging
from collections.abc import Collection
from typing import Any, Self

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import channels_last, eval_mode

from .arguments import ClipMiniTrainingArguments

logger = logging.getLogger(__name__)

# Their forward is a loop over their children, and timm's gradient checkpointing runs the children without it.
CONTAINERS = (nn.Sequential, nn.ModuleList)


def stage_parts(timm_model: nn.Module) -> list[list[str]]:
    """List the names of a timm model's parameters in the stages of timm's layer-wise learning rates, by depth.

    Returns:
        The names of each stage, from the stem to the head. Each parameter is in exactly one stage.

    Raises:
        ValueError: timm defines no stages for this architecture.
    """
    group_matcher: Any = getattr(timm_model, "group_matcher", None)
    try:
        matcher = group_matcher and group_matcher(coarse=True)
    except AssertionError:  # some architectures refuse coarse groups this way
        matcher = None
    if matcher is None:
        raise ValueError(
            f"timm defines no stages for {type(timm_model).__name__}: train the whole vision tower or freeze it, or "
            "choose another architecture."
        )
    return list(group_parameters(timm_model, matcher).values())


class FrozenStages:
    """The modules of a timm model that come before its first trainable stage; made by `find`.

    The caller keeps these modules frozen and in eval mode: a BatchNorm that updates its statistics, or a dropout,
    would make the cached activations wrong.

    Attributes:
        modules: the modules, by their names in the timm model.
        entry: name of the module that the activation enters.
    """

    def __init__(self, timm_model: nn.Module, modules: dict[str, nn.Module], entry: str) -> None:
        self._timm_model = timm_model
        self.modules = modules
        self.entry = entry

    @classmethod
    def find(cls, timm_model: nn.Module, num_trainable_stages: int, example: Tensor) -> Self | None:
        """Find the modules before the first trainable stage, and check that the model can resume after them.

        Modules are taken in the order of their definition. A model need not run them in this order; it may pass more
        than one tensor from the last of them to the rest, or do something itself in between (vision transformers add
        position embeddings there). So the model is resumed once, and has to give the same output.

        Args:
            timm_model: the model; left unchanged.
            num_trainable_stages: number of trained stages at the end, at least 1 and fewer than there are.
            example: (B, 3, height, width) normalized images, on the model's device and in its dtype.

        Returns:
            The frozen stages; or None, with a warning that gives the reason, if the architecture cannot be split, so
            that the whole tower has to run.

        Raises:
            ValueError: timm defines no stages for this architecture.
        """
        stages = stage_parts(timm_model)
        assert 0 < num_trainable_stages < len(stages), "nothing to freeze, or nothing to train"
        trainable = {name for stage in stages[-num_trainable_stages:] for name in stage}
        frozen_stages = cls(timm_model, *_split(timm_model, trainable))
        with eval_mode(timm_model):
            fault = frozen_stages._find_fault(example)
        if fault is None:
            return frozen_stages
        logger.warning(
            "%s cannot be split before %s: %s. The whole tower has to run at every step",
            *(type(timm_model).__name__, frozen_stages.entry or "its first trainable parameter", fault),
        )
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model: a data worker only needs to know that there are frozen stages."""
        return {"modules": dict.fromkeys(self.modules), "entry": self.entry, "_timm_model": None}

    @torch.no_grad()
    def run(self, pixel_values: Tensor) -> Tensor:
        """Run only the frozen modules on (B, 3, height, width) normalized images.

        Returns:
            (B, ...) the input of the first trainable module, without gradient.
        """
        parts = (part for module in self.modules.values() for part in module.modules())
        assert not any(part.training for part in parts), "frozen stages run in eval mode"
        entry = self._timm_model.get_submodule(self.entry)
        with entry.register_forward_pre_hook(_stop, with_kwargs=True):
            try:
                self._timm_model(pixel_values)
            except _EntryReached as reached:
                return reached.activation
        raise RuntimeError(f"{self.entry} was never run")

    def run_beside(self, model: ClipMiniModel, pixel_values: Tensor) -> Tensor:
        """Run the frozen modules, and the side tower if the model has one.

        Returns:
            (B, ...) what `run` returns; the side tower's pooled output, padded with zeros, fills further rows of the
            first dimension after B, so that one array holds both.
        """
        activation = self.run(pixel_values)
        if not model.side_width:
            return activation
        side = model.pool_side(pixel_values)
        side = F.pad(side, (0, -side.shape[1] % activation[0, 0].numel()))
        return torch.cat([activation, side.reshape(len(side), -1, *activation.shape[2:])], dim=1)

    def resumed(self, module: Any) -> Any:
        """Return a module that takes activations instead of images, and runs only what comes after the frozen modules.

        It shares parameters, buffers, hooks and modes with `module` as they are now, which is left as it is; so make
        it anew for each forward pass, which takes a few microseconds per submodule. It may overwrite the activations,
        since some stages begin with an in-place operation.

        Args:
            module: the timm model, or a `ClipMiniModel` that holds it; a copy of the one it was found in will do.
        """
        timm_model = module.vision_model.timm_model if isinstance(module, ClipMiniModel) else module
        return _without(module, {timm_model.get_submodule(name) for name in self.modules})

    def resume(self, model: ClipMiniModel, activation: Tensor) -> Tensor:
        """Run the rest of the vision towers on what `run_beside` returned: (B, ...) to (B, V), as `pool_images`."""
        side = None
        if model.side_width:
            num_rows = -(-model.side_width // activation[0, 0].numel())
            activation, side = activation.split([activation.shape[1] - num_rows, num_rows], dim=1)
            side = side.flatten(1)[:, : model.side_width]
        if activation.ndim == 4:  # activations may be tokens
            activation = channels_last(activation)
        pooled: Tensor = self.resumed(model).pool_images(activation, side)
        return pooled

    @torch.no_grad()
    def _find_fault(self, example: Tensor) -> str | None:
        """Compare the resumed model with the whole model; return what is wrong, or None."""
        whole = self._timm_model(example)
        if not any(True for module in self.modules.values() for _ in module.parameters()):
            return "there is no stage before it"
        unchanged = []
        try:
            activation = self.run(example)
            if len(activation) != len(example):
                return f"its input has shape {tuple(activation.shape)}, not one row for each of the images"
            with self._timm_model.get_submodule(self.entry).register_forward_pre_hook(
                lambda module, inputs: unchanged.append(torch.equal(inputs[0], activation))
            ):
                resumed = self.resumed(self._timm_model)(activation.clone())
            # The output alone could agree by chance: the blocks of an untrained model often do almost nothing.
            if unchanged != [True] or not torch.allclose(resumed, whole, rtol=1e-6, atol=1e-6):
                return "resumed there, the model gives another output, so it does not just run its modules in turn"
        except Exception as error:  # nearly anything can go wrong in a model that gets activations for images
            return f"{type(error).__name__}: {error}"
        return None


class _EntryReached(Exception):
    """Stops a forward pass; not an error."""

    def __init__(self, activation: Tensor) -> None:
        super().__init__()
        self.activation = activation


def _stop(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise TypeError(f"{type(module).__name__} takes more than one tensor")
    raise _EntryReached(inputs[0])


def _without(module: Any, frozen: Collection[nn.Module]) -> Any:
    """Replace modules by pass-throughs in copies of those that hold them; all else is shared."""
    if module in frozen:
        return _PassThrough()
    children = {name: _without(child, frozen) for name, child in module._modules.items() if child is not None}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    copied = copy.copy(module)
    copied._modules = {**module._modules, **children}
    return copied


class _PassThrough(nn.Module):
    """Returns its first argument."""

    def forward(self, activation: Tensor, *_: Any, **__: Any) -> Tensor:
        return activation


def _split(module: nn.Module, trainable: Collection[str], prefix: str = "") -> tuple[dict[str, nn.Module], str]:
    """Return the modules defined before the first one with a trainable parameter, and the name of that one.

    Containers are replaced by their children, whether they are split or lie wholly before; the name is "" if there is
    no trainable parameter.
    """
    frozen_stages: dict[str, nn.Module] = {}
    for child_name, child in module.named_children():
        name = prefix + child_name
        if type(child) in CONTAINERS:
            inside, entry = _split(child, trainable, f"{name}.")
            frozen_stages.update(inside)
            if entry:
                return frozen_stages, entry
        elif any(parameter in trainable for parameter, _ in child.named_parameters(prefix=name)):
            return frozen_stages, name
        else:
            frozen_stages[name] = child
    return frozen_stages, ""


def parameter_groups(model: ClipMiniModel, args: ClipMiniTrainingArguments) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and weight decay.

    Towers have rates of their own, the heads and the temperature `learning_rate`. Weight decay applies to matrices and
    kernels only: it is of no use on norms and biases, and would pull the temperature toward a logit scale of 1.

    Returns:
        Parameter groups for a torch optimizer; `part` is "heads" or the name of a tower.
    """
    rates = {"vision_model": args.vision_learning_rate, "text_model": args.text_learning_rate, "heads": None}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            top = name.partition(".")[0]
            part = top if top in rates else "heads"
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate if rates[part] is None else rates[part],
            "weight_decay": args.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in groups.items()
    ]
