"""transformers' own test suites on clipmini's classes, from the source archive of the installed version.

Names in the lists are "Class::test" of clipmini_in_suites.py, as regular expressions.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

from downloads import source_archive

pytestmark = pytest.mark.slow

# What cannot apply to a dual encoder over timm. It is run and must fail, so that nothing stays here that would pass.
EXPECTED_FAILURES = {
    "ModelTest::test_(hidden_states_output|attention_outputs|retain_grad_hidden_states_attentions)": (
        "a dual encoder has hidden states and attentions of each tower, inside `text_model_output` and "
        "`vision_model_output`, as CLIP has; the halves run these tests"
    ),
    "ModelTest::test_get_image_features_attentions": "timm models give no attentions",
    "VisionModelTest::test_gradient_checkpointing_enable_disable": (
        "it looks for transformers' layer class; timm recomputes by a switch of its own, which other tests use"
    ),
    "VisionModelTest::test_(model_get_set_embeddings|resize_tokens_embeddings)": "images have no token embeddings",
    "VisionModelTest::test_retain_grad_hidden_states_attentions": (
        "timm's feature maps are copies beside the path to its output: no gradient comes back to them"
    ),
    "(Vision|Text)ModelTest::test_training.*": "one half alone has no loss; the whole model runs these tests",
}
# The same, but skipped by the suites themselves, in these words.
SKIPPED_BY_THEM = {
    r"_keep_in_fp32_modules": "no module is kept in float32",
    r"does not support grouped_mm|no sparse experts|no `output_router_logits`": "no mixture of experts",
    r"does not support attentions|does not output attentions|does not support output_attentions": (
        "timm models give no attentions, and so the dual encoder has none of its own"
    ),
    r"does not support sliding window": "no sliding windows",
    r"does not have a TP plan": "no tensor parallelism",
    r"does not have position embeddings|doesn't use `inputs_embeds`": "captions come as `input_ids`",
    r"no `base_model_class` defined in tester": "no rotary position embeddings of its own",
    r"(decoder-only|sequence-to-sequence) language modeling head": "no language modeling",
    r"No conversion found|Only PrefixChange conversions": "no checkpoints of another layout to convert",
    r"No usage of the `capture_outputs` decorator|Cannot capture hidden states": "timm collects feature maps itself",
    r"ClipMini(Text)?Model does not support SDPA|not (a )?composite": "for models that are composite, or are not",
    r"differentiable loss was available .* enable_input_require_grads": "images have no token embeddings",
    r"chat template|_get_num_multimodal_tokens": "no chat, and no placeholders of images among the tokens",
    r"(feature_extractor|video_processor) attribute not present": "images and captions only",
    r"is not in `self.pipeline_model_mapping`|`run_pipeline_test` is currently not impl": "a task of other models",
    r"test requires (librosa|Torchcodec|av|PyTesseract)": "sound, video and scanned documents, which it does not read",
}
# Run where there is such hardware, or such a package for it.
NEEDS = r"test requires (accelerator|multiple accelerators|MPS|Flash Attention.*|deepspeed|the kernels library)$"

# What the archive leaves out. Nothing of the two mixins applies to models that do not generate.
STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}
PIPELINE_PARTS = {
    "ClipMiniModel": {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": ["CLIPImageProcessor"]},
    "ClipMiniVisionModel": {"tokenizer_classes": [], "processor_classes": ["CLIPImageProcessor"]},
    "ClipMiniTextModel": {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []},
}
CONFTEST = """
import json, re, pytest
EXPECTED_FAILURES = json.loads({lists!r})
def pytest_collection_modifyitems(items):
    for item in items:
        for pattern, reason in EXPECTED_FAILURES.items():
            if re.fullmatch(pattern, f"{{item.cls.__name__}}::{{item.name}}"):
                item.add_marker(pytest.mark.xfail(reason=reason))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run all of them; "Class::test" to what came of it: "passed", or the reason why not and the details."""
    folder = tmp_path_factory.mktemp("suites")
    with tarfile.open(source_archive("transformers", transformers.__version__)) as archive:
        root = f"transformers-{transformers.__version__}/tests/"
        members = [member for member in archive.getmembers() if member.name.startswith(root)]
        for member in members:
            member.name = member.name.removeprefix(f"transformers-{transformers.__version__}/")
        archive.extractall(folder, members, filter="data")
    for name, content in STUBS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    (folder / "tiny" / "reports").mkdir(parents=True)
    (folder / "tiny" / "reports" / "tiny_model_summary.json").write_text(json.dumps(PIPELINE_PARTS))
    source = Path(__file__).with_name("clipmini_in_suites.py").read_text(encoding="utf-8")
    (folder / "test_clipmini.py").write_text(source, encoding="utf-8")
    (folder / "conftest.py").write_text(CONFTEST.format(lists=json.dumps(EXPECTED_FAILURES)))
    environment = {**os.environ, "TRANSFORMERS_TINY_MODEL_PATH": str(folder / "tiny"), "RUN_SLOW": "1"}
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "-p",
        "no:xdist",
        "--junitxml=out.xml",
        "--tb=short",
    ]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", ".", "test_clipmini.py"]
    subprocess.run(command, cwd=folder, env=environment, check=False)
    return dict(read_outcomes(folder / "out.xml"))


def read_outcomes(report):
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"
        parts = [part for part in case if part.tag in ("failure", "error", "skipped")]
        failures = [part for part in parts if part.tag != "skipped"]
        if failures:
            yield name, ("failed", "\n".join(f"{part.get('message')}\n{part.text}" for part in failures))
        elif not parts:
            yield name, ("passed", "")
        else:
            kind = "xfail" if parts[0].get("type") == "pytest.xfail" else "skipped"
            yield name, (kind, parts[0].get("message"))


@pytest.mark.parametrize("suite", ["ModelTest", "VisionModelTest", "TextModelTest", "ProcessorTest", "PipelineTest"])
def test_all_that_can_apply_passes(suite, outcomes):
    own = {name: outcome for name, outcome in outcomes.items() if name.startswith(f"{suite}::")}
    failed = {name: details for name, (kind, details) in own.items() if kind == "failed"}
    assert not failed, "\n\n".join(f"{name}\n{details}" for name, details in failed.items())
    assert sum(kind == "passed" for kind, _ in own.values()) >= 6


def test_what_is_not_run_stands_in_a_list_and_the_lists_name_no_more(outcomes, capsys):
    to_fail = {
        name: kind
        for name, (kind, _) in outcomes.items()
        if any(re.fullmatch(pattern, name) for pattern in EXPECTED_FAILURES)
    }
    assert set(to_fail.values()) == {"xfail"}, (
        f"these pass: {[name for name, kind in to_fail.items() if kind != 'xfail']}"
    )
    skipped = {name: words for name, (kind, words) in outcomes.items() if kind == "skipped"}
    needing = {name for name, words in skipped.items() if re.search(NEEDS, words)}
    listed = {name for name, words in skipped.items() if any(re.search(pattern, words) for pattern in SKIPPED_BY_THEM)}
    assert {name: words for name, words in skipped.items() if name not in needing | listed} == {}
    idle = {pattern for pattern in EXPECTED_FAILURES if not any(re.fullmatch(pattern, name) for name in to_fail)}
    idle |= {pattern for pattern in SKIPPED_BY_THEM if not any(re.search(pattern, word) for word in skipped.values())}
    assert idle == set()
    counts = {"passed": sum(kind == "passed" for kind, _ in outcomes.values()), "cannot apply, and fail": len(to_fail)}
    counts |= {"cannot apply, and are skipped by the suites": len(listed), "need hardware or packages": len(needing)}
    assert sum(counts.values()) == len(outcomes)
    with capsys.disabled():
        sys.stdout.write(f"\ntransformers {transformers.__version__}'s suites: {counts}\n")
