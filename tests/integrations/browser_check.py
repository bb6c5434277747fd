"""Run in the environment `browser`: a person uses the pages in a real Chromium. Prints what it wants done to the
service (`restart`), waits for a line, and ends with 0 where all was as it should be.

    python browser_check.py CHROMIUM URL KEY FOLDER MODEL DATA WIDE BUDGET

BUDGET is a job's, in seconds. WIDE is a model whose weights lie in another file beside it, as PyTorch writes it today.
"""

import base64
import json
import re
import sys
import time
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM, URL, KEY, FOLDER, MODEL, DATA, WIDE, BUDGET = sys.argv[1:]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
SERIOUS = ("serious", "critical")
faults: list[str] = []
minor: list[str] = []
expected_errors: list[str] = []  # what the console may say for a while


def shot(page: Page, name: str) -> None:
    page.screenshot(path=f"{FOLDER}/{name}.png", full_page=True)


def listen(page: Page) -> Page:
    """A refusal by the page's policy, or an error in a script, is a fault."""

    def said(message) -> None:
        if message.type == "error" and not any(re.search(words, message.text) for words in expected_errors):
            faults.append(f"{page.url}: console: {message.text}")

    page.on("console", said)
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    return page


def accessible(page: Page, name: str) -> None:
    """Nothing serious for axe-core, in light and dark; nothing wider than a phone but what scrolls within itself."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        options = {"resultTypes": ["violations"]}
        context = {"exclude": [["#swagger-ui"]]} if name == "docs" else None
        found = Axe().run(page, context=context, options=options).response["violations"]
        for violation in found:
            where = [node["html"][:160] for node in violation["nodes"][:3]]
            told = f"{name} ({scheme}): {violation['impact']}: {violation['id']}: {where}"
            (faults if violation["impact"] in SERIOUS else minor).append(told)
    shot(page, f"{name}-dark")
    page.emulate_media(color_scheme="light")
    shot(page, name)
    page.set_viewport_size({"width": 360, "height": 740})
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if wide > 0 and name != "docs":
        faults.append(f"{name}: {wide} px wider than a phone's screen")
    shot(page, f"{name}-phone")
    page.set_viewport_size({"width": 1200, "height": 900})


def drop(page: Page, kind: str, path: str) -> None:
    """Drag a file onto the page."""
    data = page.evaluate_handle(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
            return data;
        }""",
        [base64.b64encode(Path(path).read_bytes()).decode(), Path(path).name],
    )
    page.dispatch_event(f"form.upload[data-kind={kind}]", "dragover", {"dataTransfer": data})
    page.dispatch_event(f"form.upload[data-kind={kind}]", "drop", {"dataTransfer": data})


def submit(page: Page) -> str:
    page.get_by_label("Time for the job, at most").fill(BUDGET)
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile(r"/jobs/job_"))
    return page.url.rpartition("/")[2]


def signs_in(page: Page) -> None:
    page.goto(f"{URL}/models")
    expect(page).to_have_url(re.compile("/login"))
    page.get_by_label("API key").fill("ank_wrong")
    expected_errors.append("403")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not a live key")
    expected_errors.clear()
    accessible(page, "login")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{URL}/models")


def uploads(page: Page) -> None:
    page.goto(URL)
    accessible(page, "start")
    drop(page, "models", MODEL)
    page.wait_for_url(re.compile(r"/jobs/new\?model="))
    expect(page.locator("#model option:checked")).to_contain_text("model")
    Path(f"{FOLDER}/broken.onnx").write_bytes(b"no model")
    expected_errors.append("422")
    page.locator("#file-models").set_input_files(f"{FOLDER}/broken.onnx")
    told = page.locator("form.upload[data-kind=models] .told")
    expect(told).to_have_class(re.compile("no"), timeout=20_000)
    expected_errors.clear()
    page.locator("#file-datasets").set_input_files(DATA)
    expect(page.locator("#validation option:checked")).to_contain_text("validation", timeout=20_000)
    accessible(page, "new")


def watches(page: Page, other: Page) -> str:
    """In two tabs; the API is restarted meanwhile."""
    job = submit(page)
    listen(other).goto(page.url)
    for tab in (page, other):
        expect(tab.locator("#live")).to_contain_text("Time left of the budget", timeout=30_000)
        expect(tab.get_by_role("heading", name="Candidates", exact=True)).to_be_visible(timeout=30_000)
    accessible(page, "running")
    expected_errors.extend(
        ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED", "ERR_CONNECTION_RESET", "ERR_EMPTY", "object Event"]
    )
    print("restart", flush=True)
    sys.stdin.readline()
    for tab in (page, other):
        expect(tab.locator("#live .state")).to_contain_text("succeeded", timeout=180_000)
        expect(tab.get_by_role("heading", name="What did I gain?")).to_be_visible(timeout=20_000)
        expect(tab.locator("#cancel form")).to_have_count(0)
    expected_errors.clear()
    return job


def reads(page: Page, job: str) -> None:
    page.goto(f"{URL}/jobs/{job}")
    for heading in ("What did I gain?", "Can I trust it?", "What next?"):
        expect(page.get_by_role("heading", name=heading)).to_be_visible()
    text = page.locator("main").inner_text()
    if found := re.search(r"\d[eE][+-]\d|\{['\"]", text):
        faults.append(f"report: a figure or a dump that nobody reads: {text[found.start() - 60 : found.end() + 60]!r}")
    told = page.locator(".report svg g > title").all_text_contents()
    if not any(re.search(r": p50 .*, of [\d,]+ calls$", words) for words in told):
        faults.append(f"report: no figures under the pointer: {told[:5]}")
    accessible(page, "report")
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile("^Bundle")).click()
    path = Path(FOLDER) / "bundle.zip"
    download.value.save_as(path)
    assert path.read_bytes()[:2] == b"PK", "a bundle is a zip"
    page.goto(f"{URL}/v1/jobs/{job}/report")
    expect(page.get_by_role("heading", name="What did I gain?")).to_be_visible()


def cancels_and_compares(page: Page, job: str) -> None:
    page.goto(f"{URL}/jobs/new?like={job}")
    page.get_by_label("Batch sizes").fill("2, 3")  # so that it has something to measure
    second = submit(page)
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#live .badge")).to_have_text("cancelled", timeout=20_000)
    page.goto(f"{URL}/jobs")
    for one in (job, second):
        page.locator(f"#pick-{one}").check()
    time.sleep(5)  # the rows come anew
    expect(page.locator(f"#pick-{job}")).to_be_checked()
    accessible(page, "jobs")
    page.get_by_role("button", name="Compare the picked ones").click()
    expect(page.locator("table.compare")).to_contain_text("cancelled")
    accessible(page, "compare")
    page.goto(f"{URL}/engines")
    page.get_by_role("checkbox", name=re.compile("^Compare ")).first.check()
    page.get_by_role("button", name="Compare the picked ones").click()
    expect(page.locator("table.compare")).to_contain_text("Measured on")


def looks_around(page: Page) -> None:
    for path in ("models", "datasets", "engines", "workers", "webhooks", "keys"):
        page.goto(f"{URL}/{path}")
        accessible(page, path)
    page.goto(f"{URL}/models")
    page.locator("tbody a").first.click()
    expect(page.get_by_role("heading", name="Operators")).to_be_visible()
    expect(page.locator("ol.outline")).to_contain_text("Conv → ")
    accessible(page, "model")
    page.goto(f"{URL}/models")
    page.locator("#file-models").set_input_files([WIDE, f"{WIDE}.data"])
    page.wait_for_url(re.compile(r"/jobs/new\?model="))
    expect(page.locator("#model option:checked")).to_contain_text("wide (archive")
    page.goto(f"{URL}/docs")
    expect(page.locator("#swagger-ui .opblock").first).to_be_visible(timeout=30_000)
    accessible(page, "docs")
    page.goto(f"{URL}/jobs")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1200, "height": 900})
        context.set_default_timeout(20_000)
        page = listen(context.new_page())
        foreign: list[str] = []
        context.on(
            "request", lambda r: foreign.append(r.url) if not r.url.startswith((URL, "data:", "blob:")) else None
        )
        signs_in(page)
        uploads(page)
        job = watches(page, context.new_page())
        reads(page, job)
        cancels_and_compares(page, job)
        looks_around(page)
        without = browser.new_context(java_script_enabled=False, storage_state=context.storage_state()).new_page()
        without.goto(f"{URL}/jobs/{job}")
        expect(without.get_by_role("heading", name="What did I gain?")).to_be_visible()
        shot(without, "without-script")
        page.goto(f"{URL}/jobs")
        page.get_by_role("button", name="Sign out").click()
        expect(page).to_have_url(re.compile("/login"))
        page.goto(f"{URL}/jobs/{job}")
        expect(page).to_have_url(re.compile("/login"))
        faults.extend(f"asked another host: {url}" for url in foreign)
        browser.close()
    print(json.dumps({"faults": faults, "minor": minor}, indent=1), flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
