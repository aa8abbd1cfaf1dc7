"""`clipmini serve` and the JavaScript client of Hugging Face, @huggingface/inference from npm."""

import json
import shutil
import subprocess

import pytest
from PIL import Image

from clipmini.inference.embed import load_model
from modeling_clipmini.handler import RequestHandler
from serving import serve_command

PACKAGE = "@huggingface/inference@4.13.30"
LABELS = ["a red square", "a blue disc", "nothing at all"]
PROGRAM = """
import { readFileSync } from "node:fs";
import { InferenceClient } from "@huggingface/inference";

const [url, path, labels] = process.argv.slice(2);
const client = new InferenceClient().endpoint(url);
const image = new Blob([readFileSync(path)], { type: "image/png" });
const parameters = { candidate_labels: JSON.parse(labels), hypothesis_template: "a photo of {}" };
const answers = {
  blob: await client.zeroShotImageClassification({ inputs: image, parameters }),
  object: await client.zeroShotImageClassification({ inputs: { image: await image.arrayBuffer() }, parameters }),
  text: await client.featureExtraction({ inputs: "a fish" }),
  texts: await client.featureExtraction({ inputs: ["a fish", "a dog"], normalize: false, dimensions: 4 }),
};
try {
  await client.zeroShotImageClassification({ inputs: image, parameters: { candidate_labels: ["a", "a"] } });
} catch (error) {
  answers.error = { message: error.message, status: error.httpResponse.status };
}
console.log(JSON.stringify(answers));
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="node and npm are not installed"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Install the client from npm, next to a program that imports it."""
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text('{"private": true}')
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE], cwd=folder, check=True)
    (folder / "program.mjs").write_text(PROGRAM)
    return folder / "program.mjs"


def test_the_client_gets_the_answers_of_the_handler(program, tiny_folder, tmp_path):
    image = tmp_path / "image.png"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(image)
    with serve_command(tiny_folder) as (url, _):
        command = ["node", program, url, image, json.dumps(LABELS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    handler = RequestHandler(load_model(tiny_folder))
    parameters = {"candidate_labels": LABELS, "hypothesis_template": "a photo of {}"}
    expected = handler({"inputs": image.read_bytes(), "parameters": parameters})
    for answer in (answers["blob"], answers["object"]):
        assert [item["label"] for item in answer] == [item["label"] for item in expected]
        assert [item["score"] for item in answer] == pytest.approx([item["score"] for item in expected], abs=1e-5)
    assert answers["text"] == pytest.approx(handler({"inputs": "a fish"}), abs=1e-5)
    plain = handler({"inputs": ["a fish", "a dog"], "normalize": False})
    for vector, whole in zip(answers["texts"], plain, strict=True):
        assert vector == pytest.approx(whole[:4], abs=1e-5)
    assert answers["error"]["status"] == 422
    assert "'a' is given twice" in answers["error"]["message"]
