"""Run in the environment `browser`: people sign in at an identity provider in a real Chromium, look at the pages, and
sign out. Ends with 0 where all was as it should be.

    python oidc_browser_check.py CHROMIUM URL ISSUER FOLDER [LINK]

With LINK, the one that `anneal login --oidc` shows, somebody opens that and agrees, and nothing else.
"""

import re
import sys

from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM, URL, ISSUER, FOLDER, *LINK = sys.argv[1:]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


def log_in(page: Page, name: str) -> None:
    """At the provider: who it is, and that the service may know."""
    expect(page).to_have_url(re.compile(f"^{re.escape(ISSUER)}/interaction/"))
    page.locator("[name=login]").fill(name)
    page.locator("[name=password]").fill("of no use")
    page.locator("[type=submit]").click()
    page.locator("[type=submit]").click()


def sign_in(page: Page, name: str) -> None:
    page.get_by_role("link", name=re.compile("^Sign in at ")).click()
    log_in(page, name)


def agrees(page: Page) -> None:
    """To what the command line asked for."""
    page.goto(LINK[0])
    page.locator("[type=submit]").first.click()
    log_in(page, "mia")
    page.screenshot(path=f"{FOLDER}/device.png")


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context()
        context.set_default_timeout(20_000)
        # Fonts of the provider's own pages, from elsewhere: nothing answers there
        context.route(re.compile(f"^(?!{re.escape(URL)}|{re.escape(ISSUER)})"), lambda route: route.abort())
        page = context.new_page()
        if LINK:
            agrees(page)
            browser.close()
            return
        refused: list[str] = []
        page.on("console", lambda m: refused.append(m.text) if "Content Security Policy" in m.text else None)

        page.goto(f"{URL}/models?one=1&two=2")
        expect(page).to_have_url(re.compile("/login"))
        page.screenshot(path=f"{FOLDER}/login.png")
        sign_in(page, "mia")
        expect(page).to_have_url(f"{URL}/models?one=1&two=2")
        expect(page.get_by_role("button", name="Sign out")).to_be_visible()
        page.goto(f"{URL}/account")
        expect(page.locator("main")).to_contain_text("mia")
        expect(page.locator("main")).to_contain_text("admin")
        page.screenshot(path=f"{FOLDER}/account.png")
        page.goto(f"{URL}/keys")
        page.get_by_label("What the key is for").fill("by mia")
        page.get_by_role("button", name=re.compile("Make")).click()
        expect(page.locator("main")).to_contain_text("ank_")
        cookies = {cookie["name"]: cookie for cookie in context.cookies(URL)}
        assert cookies["anneal_session"]["httpOnly"], cookies
        assert cookies["anneal_session"]["sameSite"] == "Strict", cookies
        assert "anneal_begun" not in cookies, cookies

        # Signing out here leads to signing out there, and back
        page.get_by_role("button", name="Sign out").click()
        expect(page).to_have_url(re.compile(f"^{re.escape(ISSUER)}/session/end"))
        page.locator("[name=logout], button[autofocus]").first.click()
        expect(page).to_have_url(re.compile(f"^{re.escape(URL)}/login"))
        page.goto(f"{URL}/models")
        expect(page).to_have_url(re.compile("/login"))

        # Somebody whom the provider knows, and this service does not
        sign_in(page, "nobody")
        expect(page.locator("main")).to_contain_text("names no tenant")
        page.screenshot(path=f"{FOLDER}/nobody.png")
        page.goto(f"{URL}/models")
        expect(page).to_have_url(re.compile("/login"))
        assert not refused, refused
        browser.close()


if __name__ == "__main__":
    main()
