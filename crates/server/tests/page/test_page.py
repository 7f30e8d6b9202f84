"""Tests the page in headless Chromium. `run` installs what this needs and starts it.

The page comes from a fake server, or from a real one (--url). Answers that only a script can give (errors, hostile
text, calls) always come from the fake server; with --url the browser's requests for them are sent there instead.
"""

import argparse
import json
import re
import sys
import unittest
import urllib.request
from functools import partial

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

import fake_server

MOST_BYTES = 25 * 1024
options = argparse.Namespace(url=None, key=None, shots=None)


class PageTest(unittest.TestCase):
    """A fresh browser profile with the page open, for each test."""

    is_live = False                                 # whether answers come from the real server, if there is one
    window = {"width": 1000, "height": 800}
    browser_options = {}

    @classmethod
    def setUpClass(cls):
        cls.playwright = sync_playwright().start()
        cls.browser = cls.playwright.chromium.launch(executable_path=options.chromium)
        cls.fake = fake_server.FakeServer()

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()
        cls.playwright.stop()
        cls.fake.shutdown()
        cls.fake.server_close()

    def setUp(self):
        self.fake.reset()
        self.context = self.browser.new_context(viewport=self.window, **self.browser_options)
        self.context.set_default_timeout(10_000)
        self.addCleanup(self.context.close)
        self.open()

    def open(self):
        self.page = self.context.new_page()
        self.faults = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda line: self.faults.append(line.text) if "Content Security Policy" in line.text else None)
        if options.url and not self.is_live:
            for path in ("v1/chat/completions", "props", "metrics"):
                self.page.route(f"**/{path}", partial(self.send_to_fake, path))
        if options.key and self.is_live:
            self.page.add_init_script(f"sessionStorage.apiKey = {json.dumps(options.key)}")
        self.page.goto(options.url or self.fake.url)

    def send_to_fake(self, path, route):
        route.continue_(url=self.fake.url + path)

    def tearDown(self):
        self.assertEqual(self.faults, [], "errors of the page")

    def say(self, text):
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def status(self, text, timeout=6000):
        expect(self.page.locator("#status")).to_have_text(re.compile(text), timeout=timeout)

    @property
    def answer(self):
        return self.page.locator("article.assistant").last

    def talk(self, text):
        self.say(text)
        self.status("Answered|Waiting for the results")

    def is_too_wide(self):
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")

    def axe(self):
        found = Axe().run(self.page)
        self.assertEqual(found.violations_count, 0, found.generate_report())

    def shot(self, name):
        if options.shots:
            self.page.screenshot(path=f"{options.shots}/{name}.png")


class Live(PageTest):
    """What any server's answers must do."""

    is_live = True
    patience_ms = 120_000

    def test_types_stops_reloads(self):
        self.say("hello")
        self.status("Answered", self.patience_ms)
        first = self.answer.inner_text()
        self.assertRegex(first, r"\d+ tokens, [\d.]+ t/s · prompt [\d,]+ tokens")
        self.say("slow and steady: please count from one to a thousand, in words.")
        expect(self.answer).to_contain_text(re.compile(r"about [\d.]+ t/s"), timeout=self.patience_ms)
        self.page.get_by_role("button", name="Stop").click()
        expect(self.answer.locator(".note")).to_have_text("Stopped.")
        expect(self.page.get_by_role("button", name="Send")).to_be_focused()
        stopped = self.answer.inner_text()
        self.page.reload()
        expect(self.page.locator("article")).to_have_count(4)
        self.assertEqual(self.page.locator("article.assistant").first.inner_text(), first.replace("Answer again\n", ""))
        self.assertEqual(self.answer.inner_text(), stopped)

    def test_figures_of_the_server_are_shown(self):
        expect(self.page.locator("#server")).to_contain_text("tokens of context")
        for figure in ("active", "waiting", "experts:", "from disk", "memory"):
            expect(self.page.locator("#figures")).to_contain_text(figure)

    def test_the_page_is_small_and_closed(self):
        sizes = {}
        for path in fake_server.FILES:
            with urllib.request.urlopen((options.url or self.fake.url).rstrip("/") + path) as response:
                sizes[path] = len(response.read())
                self.assertEqual(response.headers["Content-Security-Policy"], fake_server.CSP)
        print(f"\nbytes: {sizes}, together {sum(sizes.values())}", file=sys.stderr)
        self.assertLess(sum(sizes.values()), MOST_BYTES)


class Scripted(PageTest):
    def test_streams(self):
        self.say("slow")
        expect(self.answer).to_contain_text("word3 ")
        self.assertNotIn("word399", self.answer.inner_text())
        expect(self.answer).to_contain_text(re.compile(r"about [\d.]+ t/s"))
        self.page.keyboard.press("Escape")
        self.status("Stopped")
        self.talk("hello")
        self.page.wait_for_timeout(500)                     # the server notices when it writes
        self.assertEqual(self.fake.disconnects, 1, "the server was not told")
        roles = [message["role"] for message in self.fake.requests[-1][1]["messages"]]
        self.assertEqual(roles, ["user", "assistant", "user"])
        expect(self.answer).to_contain_text("56 tokens, 12.3 t/s · prompt 1,234 tokens, 1,000 known")

    def test_an_answer_is_announced_once(self):
        self.page.evaluate("""() => {
            window.said = [];
            for (const live of document.querySelectorAll("[role=status], [aria-live]")) {
                const observer = new MutationObserver(() => said.push(live.textContent));
                observer.observe(live, {childList: true, characterData: true, subtree: true});
            }
        }""")
        self.talk("think")
        self.page.wait_for_timeout(100)
        self.assertEqual(self.page.evaluate("said"),
                         ["Waiting for the server…", "Thinking…", "Answering…", "Answered.", "Thought through."])

    def test_a_long_prompt_is_waited_for(self):
        self.say("prefill")
        self.status("Reading the prompt")
        self.status("Answered")
        expect(self.answer).to_contain_text("At last.")

    def test_thinking_is_folded(self):
        self.say("think")
        details = self.answer.locator("details")
        expect(details.locator("summary")).to_have_text(re.compile(r"Thinking… \d+ characters"))
        self.assertIsNone(details.get_attribute("open"))
        self.status("Answered")
        expect(details.locator("summary")).to_have_text("Thoughts: 98 characters")
        expect(details.get_by_text("Step 11.")).to_be_hidden()
        details.locator("summary").click()
        expect(details.get_by_text("Step 11.")).to_be_visible()
        self.talk("hello")
        self.assertIn("Step 11.", self.fake.requests[-1][1]["messages"][1]["reasoning_content"])

    def test_a_call_is_shown_and_its_result_sent_on(self):
        self.talk("weather")
        expect(self.answer.locator(".call pre")).to_have_text('{\n  "place": "Rome",\n  "days": [\n    1,\n    2\n  ]\n}')
        expect(self.answer.locator(".call code")).to_have_text("weather")
        self.shot("call")
        self.say("hello")
        expect(self.page.get_by_label("Result of weather")).to_be_focused()
        self.assertEqual(len(self.fake.requests), 1)
        self.page.reload()
        self.page.get_by_label("Result of weather").fill("sunny")
        self.axe()
        self.page.get_by_role("button", name="Send on").click()
        self.status("Answered")
        expect(self.answer).to_contain_text("The tool said: sunny")
        _, call, result = self.fake.requests[-1][1]["messages"]
        self.assertEqual(result, {"role": "tool", "tool_call_id": "call_0123", "content": "sunny"})
        function = {"name": "weather", "arguments": '{"place": "Rome", "days": [1, 2]}'}
        self.assertEqual(call["tool_calls"], [{"id": "call_0123", "type": "function", "function": function}])
        self.assertEqual(call["content"], "Let me look.")

    def test_a_call_that_was_cut_off_is_not_sent(self):
        self.talk("cut")
        expect(self.answer.locator(".note")).to_contain_text("Cut at the limit")
        expect(self.page.locator(".result")).to_have_count(0)
        self.talk("hello")
        self.assertNotIn("tool_calls", json.dumps(self.fake.requests[-1][1]))

    def test_markdown(self):
        self.talk("markdown")
        html = self.answer.locator("> div").first.inner_html()
        for part in [
            "<h3>Title</h3>", "<strong>bold</strong>", "<em>italic</em>", "<code>code &lt;b&gt;</code>",
            "2 * 3 * 4, snake_case_name", "<br>After a break.", ">https://example.com/bare</a>. A *star*.",
            'href="https://example.com/a_(b)" target="_blank" rel="noopener noreferrer">a link</a>',
            "<li>two, with <code>code</code><ul><li>nested<p>more of <em>nested</em></p></li></ul></li><li>three</li>",
            '<ol start="3"><li>third</li><li>fourth</li></ol>', "<blockquote><p>quoted\ntext</p></blockquote>",
            '<code>def f():\n    return "**not bold**"</code>', "<th>value</th>", "<td><strong>1</strong></td>", "<hr>",
            "<h4>End</h4>",
        ]:
            self.assertIn(part, html)
        self.axe()

    def test_hostile_text_does_nothing(self):
        self.talk("hostile")
        self.answer.locator("summary").click()
        self.page.wait_for_timeout(200)
        html = self.answer.inner_html()
        self.assertIsNone(self.page.evaluate("window.hit"))
        self.assertEqual(self.answer.locator("script, img, svg, b, iframe").count(), 0, html)
        links = self.answer.locator("a").evaluate_all("links => links.map(link => [link.protocol, link.getAttributeNames().join()])")
        self.assertEqual({tuple(link) for link in links}, {("https:", "href,target,rel")})
        self.assertIn("[click](javascript:window.hit=1)", self.answer.inner_text())

    def test_heavy_text_does_not_hang(self):
        self.page.evaluate("window.start = performance.now()")
        self.talk("heavy")
        self.assertLess(self.page.evaluate("performance.now() - start"), 5000)

    def test_errors_are_told(self):
        self.say("fail")
        self.status("The server failed: the disk is gone")
        self.say("lost")
        self.status("The connection was lost")
        expect(self.answer).to_contain_text("Half of")
        self.say("nonsense")
        self.status("The server answered 400: messages: no script for")
        self.axe()

    def test_an_answer_can_be_asked_for_again(self):
        self.talk("hello")
        self.page.get_by_role("button", name="Answer again").click()
        expect(self.page.locator("article")).to_have_count(2)
        self.status("Answered")
        self.assertEqual(self.fake.requests[0][1]["messages"], self.fake.requests[1][1]["messages"])

    def test_waits_for_a_busy_server(self):
        self.fake.busy = 2
        self.say("hello")
        self.status("busy: trying again in 1 s")
        self.status("Answered")
        self.assertEqual(len(self.fake.requests), 3)
        self.fake.busy = 1000
        self.say("hello")
        self.status("busy")
        self.page.keyboard.press("Escape")
        self.status("Stopped")

    def test_asks_for_the_key(self):
        self.fake.wants_key = True
        self.say("hello")
        self.page.get_by_label("API key, kept").fill("wrong")
        self.axe()
        self.page.keyboard.press("Enter")
        expect(self.page.get_by_label("API key, kept")).to_have_value("")
        self.page.get_by_label("API key, kept").fill(fake_server.KEY)
        self.page.keyboard.press("Enter")
        self.status("Answered")
        self.assertNotIn(fake_server.KEY, self.page.evaluate("JSON.stringify(localStorage)"))
        self.assertIn(fake_server.KEY, self.page.evaluate("JSON.stringify(sessionStorage)"))
        self.page.reload()
        expect(self.page.locator("#server")).to_contain_text("fake")
        self.talk("hello")
        self.page.close()
        self.open()
        self.say("hello")
        expect(self.page.get_by_role("dialog", name="API key")).to_be_visible()
        self.page.keyboard.press("Escape")
        self.status("wants an API key")

    def test_settings(self):
        self.page.get_by_role("button", name="Settings").click()
        self.shot("settings")
        self.axe()
        self.page.get_by_label("System prompt").fill("Be brief.")
        self.page.get_by_role("combobox", name="Thinking").select_option("max")
        self.page.get_by_label("Temperature").fill("0.5")
        self.page.get_by_label("Tools").fill("{nonsense")
        self.page.get_by_role("button", name="Save").click()
        expect(self.page.get_by_role("dialog")).to_be_visible()
        self.assertFalse(self.page.get_by_label("Tools").evaluate("box => box.checkValidity()"))
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
        self.page.get_by_label("Tools").fill(json.dumps(tools))
        self.page.get_by_role("button", name="Save").click()
        self.page.reload()
        self.talk("hello")
        _, body = self.fake.requests[-1]
        self.assertEqual(body, {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}], "stream": True,
            "stream_options": {"include_usage": True}, "reasoning_effort": "max", "temperature": 0.5, "tools": tools})

    def test_stored_things_can_be_cleared(self):
        self.talk("hello")
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.get_by_role("button", name="New conversation").click()
        expect(self.page.locator("article")).to_have_count(0)
        self.page.reload()
        expect(self.page.locator("article")).to_have_count(0)
        self.talk("hello")
        self.page.get_by_role("button", name="Settings").click()
        with self.page.expect_navigation():
            self.page.get_by_role("button", name="Clear all").click()
        expect(self.page.locator("article")).to_have_count(0)
        self.assertNotIn("hello", self.page.evaluate("JSON.stringify(localStorage)"))

    def test_what_is_stored_is_bounded(self):
        turn = [{"role": "user", "content": "x" * 9000},
                {"role": "assistant", "content": "x" * 9000, "reasoning_content": "", "page": {"called": False}}]
        self.page.evaluate("""messages => {
            onpagehide = document.onvisibilitychange = null;          // which would store what the page has
            localStorage.messages = JSON.stringify(messages);
        }""", turn * 150)
        self.page.reload()
        expect(self.page.locator("article")).to_have_count(300)
        self.say("hello")
        expect(self.answer).to_contain_text("Hello, world!")
        self.status("Too long to store")
        stored = self.page.evaluate("localStorage.messages")
        self.assertLess(len(stored), 1_000_001)
        self.assertGreater(len(stored), 400_000)
        self.assertEqual(json.loads(stored)[0]["role"], "user")
        self.assertEqual(json.loads(stored)[-1]["content"], "Hello, world!")

    def test_a_reload_in_an_answer_keeps_what_came(self):
        self.say("slow")
        expect(self.answer).to_contain_text("word3 ")
        self.page.reload()
        expect(self.answer).to_contain_text("word3 ")
        expect(self.answer.locator(".note")).to_contain_text(re.compile("Interrupted|connection was lost"))
        self.talk("hello")

    def test_copies(self):
        self.context.grant_permissions(["clipboard-read"])
        self.talk("hello")
        self.page.get_by_role("button", name="Copy").click()
        self.status("Copied")
        self.assertEqual(self.page.evaluate("navigator.clipboard.readText()"), "Hello, world!")

    def test_figures(self):
        line = self.page.locator("#figures")
        expect(self.page.locator("#server")).to_have_text("fake · cpu · exact · streamed · 32,768 tokens of context")
        expect(line).to_contain_text("2 active, 0 waiting")
        expect(line).to_contain_text("writing 5.0 t/s")
        expect(line).to_contain_text("found, 1,000 read")
        expect(line).to_contain_text("memory 6.0 GiB")
        expect(line).to_contain_text("1.0 GiB/s")
        expect(line).not_to_contain_text("reading")
        self.page.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
        self.page.wait_for_timeout(200)
        polls = self.fake.polls
        self.page.wait_for_timeout(2500)
        self.assertEqual(self.fake.polls, polls, "a hidden page asks for figures")

    def test_keyboard_alone(self):
        expect(self.page.get_by_label("Message", exact=True)).to_be_focused()
        self.page.keyboard.type("hello")
        self.page.keyboard.press("Shift+Enter")
        self.page.keyboard.type("second line")
        self.page.keyboard.press("Enter")
        self.status("Answered")
        self.assertEqual(self.fake.requests[0][1]["messages"][0]["content"], "hello\nsecond line")
        self.page.evaluate("document.body.tabIndex = -1; document.body.focus()")
        order = []
        for _ in range(7):
            self.page.keyboard.press("Tab")
            order.append(self.page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent"))
            outline = self.page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
            self.assertEqual(outline, "3px", order)
        self.assertEqual(order, ["New conversation", "Settings", "Dark", "Copy", "Answer again", "Message", "Send"])

    def test_scrolling_follows_only_at_the_end(self):
        at_end = "document.documentElement.scrollHeight - innerHeight - scrollY < 2"
        self.talk("long")
        self.page.wait_for_function(at_end)
        # The line of figures grew from none to one at any time, and left the end behind.
        height = "document.querySelector('#composer').offsetHeight"
        with_figures = self.page.evaluate(f"document.querySelector('#figures').textContent = 'figures', {height}")
        self.assertEqual(self.page.evaluate(f"document.querySelector('#figures').textContent = '', {height}"), with_figures)
        self.say("slow")
        expect(self.answer).to_contain_text("word3 ")
        self.page.evaluate("scrollTo(0, 0)")
        self.page.wait_for_timeout(400)
        self.assertEqual(self.page.evaluate("scrollY"), 0)
        self.page.keyboard.press("Escape")
        self.status("Stopped")

    def test_dark(self):
        colour = lambda: self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = colour()
        self.talk("markdown")
        self.talk("think")
        self.shot("light")
        self.page.get_by_role("button", name="Dark").click()
        dark = colour()
        self.assertNotEqual(light, dark)
        self.axe()
        self.page.evaluate("scrollTo(0, 0)")
        self.shot("dark")
        self.page.reload()
        self.assertEqual(colour(), dark)
        self.page.get_by_role("button", name="Dark").click()
        self.assertEqual(colour(), light)
        self.axe()


class SystemDark(PageTest):
    browser_options = {"color_scheme": "dark", "reduced_motion": "reduce"}

    def test_follows_the_system(self):
        expect(self.page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
        self.say("slow")
        expect(self.answer).to_contain_text("word3 ")
        self.assertEqual(self.page.evaluate("document.getAnimations().length"), 0, "motion")
        self.page.get_by_role("button", name="Stop").click()
        self.status("Stopped")
        self.talk("weather")
        self.shot("dark-call")
        self.axe()


class Phone(PageTest):
    window = {"width": 360, "height": 640}
    browser_options = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2}

    def test_nothing_is_too_wide(self):
        self.shot("phone-empty")
        for script in ["markdown", "hostile", "think", "weather"]:
            self.talk(script)
            self.assertFalse(self.is_too_wide(), script)
        self.shot("phone")
        self.axe()
        self.page.evaluate("scrollTo(0, 300)")
        self.shot("phone-markdown")
        self.page.get_by_role("button", name="Settings").click()
        self.assertFalse(self.is_too_wide())
        self.shot("phone-settings")
        self.axe()


class Zoomed(PageTest):
    """A window of 1280 × 720 at 200 %, and (320 wide) what WCAG asks of reflow."""

    window = {"width": 640, "height": 360}

    def test_nothing_is_lost(self):
        for script in ["markdown", "weather"]:
            self.talk(script)
        for width in (640, 320):
            self.page.set_viewport_size({"width": width, "height": 256})
            self.assertFalse(self.is_too_wide(), width)
            self.page.get_by_label("Result of weather").focus()
            box = self.page.get_by_label("Result of weather").bounding_box()
            self.assertGreaterEqual(box["y"], 0)
            self.assertLessEqual(box["y"] + box["height"], 256, "hidden below the window")
        self.shot("zoomed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="the page of a real server, like http://127.0.0.1:8000/")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--shots", help="a folder for screenshots")
    options, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], *rest])
