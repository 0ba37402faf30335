"""The page of a report in a browser: Debian's Chromium without a window, driven by Selenium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from simulations.report_page.page import page
from simulations.run_folders import collect
from tests.simulations.page_runs import EVIL, write_runs

pytestmark = pytest.mark.browser

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
Browser = Any  # Selenium's driver: the library may not be here

RULES = "return [...document.querySelectorAll('#comparison tbody tr:not([hidden])')].map("
RULES += "line => line.dataset.rule).join(' ')"
SORTS = "return [...document.querySelectorAll('#comparison thead th')].map(h => h.ariaSort)"
LINES = "return document.querySelectorAll('[data-chart=learning] .one').length"
WIDTHS = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
PAPER = "return getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="no Selenium: fedlora[browser]")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium here, or no driver: Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.page_load_strategy = "normal"
    service = webdriver.ChromeService(executable_path=driver)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_runs(tmp_path_factory.mktemp("runs"))
    target = folder.parent / "report.html"
    target.write_text(page(collect([folder])), encoding="utf-8")
    return target


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Callable[..., Browser]]:
    """Opens the page, so wide, in the system's light or dark; the console must stay empty."""

    def show(width: int = 1200, looks: str = "light", script: bool = True) -> Browser:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        looks_like = [{"name": "prefers-color-scheme", "value": looks}]
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": looks_like})
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get(report.as_uri())
        return browser

    yield show
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    browser.execute_script("localStorage.clear()")
    assert browser.get_log("browser") == []


def press(browser: Browser, *names: str) -> None:
    """Keys by their names in Selenium, to whatever has the focus."""
    from selenium.webdriver import ActionChains, Keys

    actions = ActionChains(browser)
    for name in names:
        actions.send_keys(getattr(Keys, name))
    actions.perform()


@contextmanager
def asking_nobody(browser: Browser) -> Iterator[None]:
    """What the page loads meanwhile is itself alone."""
    yield
    loaded = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("looks", ["light", "dark"])
def test_it_renders_and_fits(opened: Callable[..., Browser], width: int, looks: str) -> None:
    browser = opened(width, looks)
    with asking_nobody(browser):
        assert browser.title == f"bad {EVIL} – Fedlora report"  # noqa: RUF001
        full, seen = browser.execute_script(WIDTHS)
        assert full == seen == width
        drawn = "return [...document.querySelectorAll('figure')].map("
        drawn += "f => f.querySelectorAll('svg .mark, svg .bar').length)"
        assert all(browser.execute_script(drawn))
        outside = "return [...document.querySelectorAll('.chart > svg text')].filter(text => {"
        outside += (
            "const b = text.getBoundingClientRect(); return b.left < 0 || b.right > innerWidth})"
        )
        assert not browser.execute_script(outside + ".length")
        wide = "const box = document.querySelector('.scroll');"
        wide += "return box.scrollWidth > box.clientWidth"
        assert browser.execute_script(wide) or width > 390  # the table scrolls in its own box


def test_the_looks_follow_the_system_until_the_switch(opened: Callable[..., Browser]) -> None:
    dark = opened(looks="dark").execute_script(PAPER)
    browser = opened(looks="light")
    light = browser.execute_script(PAPER)
    assert dark != light
    switch = browser.find_element("id", "theme")
    switch.click()
    assert browser.execute_script(PAPER) == dark
    assert switch.get_attribute("aria-pressed") == "true"
    browser.refresh()
    assert browser.execute_script(PAPER) == dark  # remembered
    browser.find_element("id", "theme").click()
    assert browser.execute_script(PAPER) == light


def test_headings_sort_by_click_and_by_keyboard(opened: Callable[..., Browser]) -> None:
    browser = opened()
    assert browser.execute_script(RULES) == "fedavg ffa_lora lora_fair"
    mean, loss = browser.find_elements("css selector", "#comparison thead button")[1:4:2]
    mean.click()
    assert browser.execute_script(RULES) == "lora_fair fedavg ffa_lora"
    assert browser.execute_script(SORTS)[1] == "descending"
    browser.execute_script("arguments[0].focus()", mean)
    press(browser, "ENTER")
    assert browser.execute_script(RULES) == "ffa_lora fedavg lora_fair"
    assert browser.execute_script(SORTS)[1] == "ascending"
    loss.click()  # of losses, the least first
    assert browser.execute_script(RULES) == "lora_fair fedavg ffa_lora"
    sorts = browser.execute_script(SORTS)
    assert (sorts[1], sorts[3]) == ("none", "ascending")


def test_rules_are_filtered_in_table_and_charts(opened: Callable[..., Browser]) -> None:
    browser = opened()
    assert browser.execute_script(LINES) == 3
    browser.find_element("css selector", "input[value=ffa_lora]").click()
    assert browser.execute_script(RULES) == "fedavg lora_fair"
    assert browser.execute_script(LINES) == 2
    assert browser.find_element("id", "count").get_attribute("textContent") == "2 of 3 rows"
    assert len(browser.find_elements("css selector", "#legend button")) == 2
    for rule in ("fedavg", "lora_fair"):  # nothing left is no error
        browser.find_element("css selector", f"input[value={rule}]").click()
    assert browser.execute_script(LINES) == 0


def test_charts_are_read_by_pointer_and_by_keyboard(opened: Callable[..., Browser]) -> None:
    from selenium.webdriver import ActionChains

    browser = opened()
    chart = browser.find_element("css selector", "[data-chart=learning] .chart > svg")
    tip = browser.find_element("css selector", "[data-chart=learning] .tip")
    assert not tip.is_displayed()
    last = browser.find_elements("css selector", "[data-chart=learning] .mark")[-1]
    ActionChains(browser).move_to_element(last).perform()
    assert tip.text == "lora_fair\nround 2: 0.805 (0.8 to 0.81)"
    ActionChains(browser).move_to_element(browser.find_element("tag name", "h1")).perform()
    assert not tip.is_displayed()
    browser.execute_script("document.querySelector('#legend button:last-child').focus()")
    press(browser, "TAB")
    assert browser.switch_to.active_element == chart
    assert tip.text == "fedavg\nround 0: 0.3"
    press(browser, "ARROW_RIGHT", "ARROW_DOWN")
    assert tip.text.startswith("ffa_lora\nround 1: ")
    assert browser.find_element("id", "said").get_attribute("textContent") == tip.text
    press(browser, "ESCAPE")
    assert not tip.is_displayed()


def test_without_a_script_the_table_is_there(opened: Callable[..., Browser]) -> None:
    browser = opened(script=False)
    lines = browser.find_elements("css selector", "#comparison tbody tr")
    assert [line.text.split()[0] for line in lines] == ["fedavg", "ffa_lora", "lora_fair"]
    assert all(line.is_displayed() for line in lines)
    for hidden in ("#theme", ".filters", ".figures", "#legend"):
        assert not browser.find_element("css selector", hidden).is_displayed()
    assert "curves.svg" in browser.find_element("tag name", "noscript").text
