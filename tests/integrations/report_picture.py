"""Makes README's picture anew: `python -m tests.integrations.report_picture docs/report.png`.

It shows the report of the demo's job.

On a quiet machine: where it is too busy to claim a speed-up, the job runs again, and in the end nothing is written.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.factories.deployment import deployment
from tests.integrations.chromium import chromium
from tests.integrations.environments import REPOSITORY, environment

DIGITS = REPOSITORY / "examples" / "digits"
_TRIES = 3
# In the environment `browser`: as a screen of twice the density shows it.
_SHOOT = """
import sys
from PIL import Image
from playwright.sync_api import sync_playwright

browser_path, url, target = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
    page = browser.new_page(viewport={"width": 960, "height": 800}, device_scale_factor=2, color_scheme="light")
    page.goto(url)
    page.screenshot(path=target, full_page=True)
    at = page.evaluate(
        '''() => Object.fromEntries([...document.querySelectorAll("h3")].map(
            (h) => [h.textContent, h.getBoundingClientRect().top + scrollY]))'''
    )
    browser.close()
# The headline and the evidence; then what was tried.
parts = [(0, at["At every shape"]), (at["Candidates"], at["The search, in the order of trying"])]
with Image.open(target) as whole:
    cuts = [whole.convert("RGB").crop((0, int(2 * a) - 30 * (a > 0), whole.width, int(2 * b) - 30)) for a, b in parts]
joined = Image.new("RGB", (cuts[0].width, sum(cut.height for cut in cuts)))
for place, cut in zip((0, cuts[0].height), cuts):
    joined.paste(cut, (0, place))
# Flat colours and grey edges of letters: 48 of them look the same, at a third of the size.
few = joined.quantize(48, dither=Image.Dither.NONE)
few.save(target, optimize=True)
"""


def make(target: Path) -> bool:
    """Whether a speed-up was claimed, and so a picture made."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="anneal-picture-"))
        deployed = stack.enter_context(deployment(Path(folder) / "home"))
        with deployed.client() as client:
            deployed.start_worker()
            deployed.wait_ready(60)
            model = client.upload_model(DIGITS / "model.onnx", "digits")
            calibration, validation = (
                client.upload_dataset(DIGITS / f"{part}.npz") for part in ("calibration", "validation")
            )
            for _ in range(_TRIES):
                job = client.submit(
                    model_id=model.id,
                    calibration={"dataset_id": calibration.id},
                    validation={"dataset_id": validation.id, "max_accuracy_loss_percent": 1.0},
                    benchmark={"batch_sizes": [1, 8], "min_seconds": 0.3},
                    budget_seconds=14,
                    measure="again",
                )
                report = client.report(client.wait(job.id).id)
                sys.stderr.write(f"{job.id}: {report.picked}, {report.final_metrics.speedup}, claim {report.claim}\n")
                if report.claim and report.picked not in (None, "baseline"):
                    page = f"{deployed.url}/v1/jobs/{job.id}/report"
                    python = str(environment("browser") / "bin" / "python")
                    subprocess.run([python, "-c", _SHOOT, chromium(), page, str(target)], check=True, timeout=120)
                    return True
    return False


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    sys.exit(0 if make(path) else f"{path} is as it was: the machine is too busy for a speed-up to be claimed.")
