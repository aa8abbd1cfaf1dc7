"""A timm tower by depth: its stages, the frozen first of them cached, and a learning rate for every parameter.

While the first stages of a tower are frozen, what they give for an image never changes. Computed once, it is all that
training the rest needs.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from modeling_clipmini import ClipMiniModel

from .arguments import ClipMiniTrainingArguments

logger = logging.getLogger(__name__)

# Their forward is a loop over their children, and timm's gradient checkpointing runs the children without it.
CONTAINERS = (nn.Sequential, nn.ModuleList)


def stage_parts(timm_model: nn.Module) -> list[list[str]]:
    """List a timm model's parameters by depth, in the stages that timm itself uses for layer-wise learning rates.

    Args:
        timm_model: the model, as `timm.create_model` makes it.

    Returns:
        For each stage the names of its parameters, from the stem to the head. Every parameter is in one stage.

    Raises:
        ValueError: timm does not say how deep the parameters of this architecture lie.
    """
    group_matcher: Any = getattr(timm_model, "group_matcher", None)
    try:
        matcher = group_matcher and group_matcher(coarse=True)
    except AssertionError:  # some architectures refuse coarse groups this way
        matcher = None
    if matcher is None:
        raise ValueError(
            f"timm does not say what stages {type(timm_model).__name__} has: train all of this vision tower or "
            "nothing of it, or choose another architecture."
        )
    return list(group_parameters(timm_model, matcher).values())


def num_stages(timm_model: nn.Module) -> int:
    """Count the stages of a timm model, stem and head included; see `stage_parts`, also for errors."""
    return len(stage_parts(timm_model))


class FrozenStages:
    """The modules of a timm model that come before its first trainable stage.

    Make one with `find`. Whoever uses it keeps the modules in `modules` frozen and in eval mode: a BatchNorm that
    moved its statistics, or a dropout, would make the cached activations wrong.

    Attributes:
        modules: the modules, by their names in the timm model.
        entry: name of the module that the activation enters.
        activation_shape: shape of one image's activation, for images of the size that `find` was shown.
    """

    modules: dict[str, nn.Module]
    entry: str
    activation_shape: tuple[int, ...]

    def __init__(self, timm_model: nn.Module, modules: dict[str, nn.Module], entry: str) -> None:
        self._timm_model = timm_model
        self.modules = modules
        self.entry = entry

    @classmethod
    def find(cls, timm_model: nn.Module, num_trainable_stages: int, example: Tensor) -> Self | None:
        """Find the modules before the first trainable stage, and try whether the model can resume after them.

        Modules are taken in the order in which they are defined. Whether the model also runs them in this order, hands
        one tensor from the last of them to the rest, and does nothing of its own in between (vision transformers add
        position embeddings there) is tried: resumed, the model must give the same output.

        Args:
            timm_model: the model. It is left as it was.
            num_trainable_stages: how many of the last stages are trained, at least 1 and fewer than `num_stages`.
            example: (B, 3, height, width) normalized images, on the model's device and in its dtype.

        Returns:
            The frozen stages; None, with a warning that says why, where the architecture does not permit it. The whole
            tower has to be run then.

        Raises:
            ValueError: the number of stages is not possible, or timm knows no stages of this architecture.
        """
        stages = stage_parts(timm_model)
        if not 0 < num_trainable_stages < len(stages):
            raise ValueError(
                f"num_trainable_stages={num_trainable_stages} leaves nothing to split: {type(timm_model).__name__} "
                f"has {len(stages)} stages, so that 1 to {len(stages) - 1} can be trained."
            )
        trainable = {name for stage in stages[-num_trainable_stages:] for name in stage}
        frozen_stages = cls(timm_model, *_split(timm_model, trainable))
        modes = {module: module.training for module in timm_model.modules()}
        timm_model.eval()
        try:
            fault = frozen_stages._try(example)
        finally:
            for module, mode in modes.items():  # parents come before their children
                module.train(mode)
        if fault is None:
            return frozen_stages
        logger.warning(
            "%s cannot be split before %s: %s. The whole tower has to run at every step",
            *(type(timm_model).__name__, frozen_stages.entry or "its first trainable parameter", fault),
        )
        return None

    @torch.no_grad()
    def run(self, pixel_values: Tensor) -> Tensor:
        """Run the first modules only.

        Args:
            pixel_values: (B, 3, height, width) normalized images, on the model's device and in its dtype.

        Returns:
            (B, *activation_shape) what enters the first trainable module, without gradient.
        """
        parts = (part for module in self.modules.values() for part in module.modules())
        assert not any(part.training for part in parts), "frozen stages run in eval mode"
        entry = self._timm_model.get_submodule(self.entry)
        hook = entry.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self._timm_model(pixel_values)
        except _EnteredError as entered:
            return entered.activation
        finally:
            hook.remove()
        raise RuntimeError(f"{self.entry} was never run")

    @contextmanager
    def resuming(self) -> Iterator[None]:
        """Let the model take activations in place of images, and run only the rest, for the time of the context.

        The first modules hand on what they are given. Parameters, their names and the state dict stay as they are. The
        model may overwrite the activations: some stages begin with an operation in place.
        """
        own_forwards = {module: module.__dict__.get("forward") for module in self.modules.values()}
        try:
            for module in own_forwards:
                module.forward = _hand_on  # on the instance, where it hides that of the class
            yield
        finally:
            for module, own_forward in own_forwards.items():
                if own_forward is None:
                    del module.forward
                else:
                    module.forward = own_forward

    @torch.no_grad()
    def _try(self, example: Tensor) -> str | None:
        """Compare the resumed model with the whole; say what is wrong, or None."""
        whole = self._timm_model(example)
        if not any(True for module in self.modules.values() for _ in module.parameters()):
            return "no stage stands before it"
        came_through = []
        try:
            activation = self.run(example)
            if len(activation) != len(example):
                return f"what enters it has shape {tuple(activation.shape)}, not one row for each of the images"
            hook = self._timm_model.get_submodule(self.entry).register_forward_pre_hook(
                lambda module, inputs: came_through.append(torch.equal(inputs[0], activation))
            )
            try:
                with self.resuming():
                    resumed = self._timm_model(activation.clone())
            finally:
                hook.remove()
            # The output alone could agree by chance: blocks of an untrained model often start as good as empty.
            if came_through != [True] or not torch.allclose(resumed, whole, rtol=1e-6, atol=1e-6):
                return "the model resumed there gives another output, so it does more than to run its modules in turn"
        except Exception as error:  # nearly anything can go wrong in a model that gets activations for images
            return f"{type(error).__name__}: {error}"
        self.activation_shape = tuple(activation.shape[1:])
        return None


class _EnteredError(Exception):
    """Stops a forward; no error."""

    def __init__(self, activation: Tensor) -> None:
        super().__init__()
        self.activation = activation


def _stop(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise TypeError(f"{type(module).__name__} takes more than one tensor")
    raise _EnteredError(inputs[0])


def _hand_on(activation: Tensor, *_: Any, **__: Any) -> Tensor:
    return activation


def _split(module: nn.Module, trainable: Collection[str], prefix: str = "") -> tuple[dict[str, nn.Module], str]:
    """Collect the modules defined before the first that has a trainable parameter, and find that one's name.

    Containers are opened, both where they are split and where they lie wholly before; the name is "" if none is found.
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


TOWERS = ("vision_model", "text_model")


def parameter_groups(model: ClipMiniModel, args: ClipMiniTrainingArguments) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and weight decay.

    Each tower has its own rate, and the heads and the temperature another.

    Weight decay pulls matrices and kernels only: on norms and biases it does nothing useful, on the temperature it
    would be a pull toward a logit scale of 1.

    Args:
        model: the dual encoder.
        args: `learning_rate` is that of the heads and the temperature; the towers' default to it.

    Returns:
        Groups for a torch optimizer; those of heads come with `part` "heads", those of towers with the tower's name.
    """
    rates = {"heads": args.learning_rate}
    for tower, rate in zip(TOWERS, (args.vision_learning_rate, args.text_learning_rate), strict=True):
        rates[tower] = args.learning_rate if rate is None else rate
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((tower for tower in TOWERS if name.startswith(f"{tower}.")), "heads")
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": args.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in groups.items()
    ]
