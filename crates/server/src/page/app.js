// The page at /: a chat over POST /v1/chat/completions. What the model writes becomes text nodes only, never HTML.
//
// A message is what the API takes; what only the page knows of an answer is its `page`: {called, isCut, note, figures}.

const $ = id => document.getElementById(id);
const el = (tag, properties, ...children) => {
	const element = Object.assign(document.createElement(tag), properties);
	element.append(...children);
	return element;
};
const count = number => Math.round(number).toLocaleString("en");
const fixed = number => number.toFixed(1);
const gib = bytes => `${fixed(bytes / 2 ** 30)} GiB`;

// ---- Stored in the browser; the API key only until the tab is closed ----

const MOST_STORED = 1_000_000; // characters of a conversation

function load(name, otherwise) {
	try { return JSON.parse(localStorage[name]) ?? otherwise; } catch { return otherwise; }
}
function store(name, value) {
	try { localStorage[name] = JSON.stringify(value); } catch { say("The browser could not store this."); }
}

let messages = load("messages", []);
let settings = load("settings", {});

function save() {
	let kept = messages;
	while (JSON.stringify(kept).length > MOST_STORED) {
		const later = kept.slice(Math.ceil(kept.length / 2));
		kept = later.slice(Math.max(0, later.findIndex(message => message.role === "user")));
	}
	if (kept !== messages) say("Too long to store: a reload will lose the beginning.");
	store("messages", kept);
}

// ---- Markdown to elements ----

const FENCE = /^ *(```+|~~~+)/;
const HEADING = /^ *(#{1,6}) +(.*)/;
const RULE = /^ *([-*_])( *\1){2,} *$/;
const QUOTE = /^ *> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
const TABLE = /^ *\|?( *:?-+:? *\|)+[ :-]*$/; // its second line
const DEPTH = 8; // deeper is plain text

/** The blocks of a text: each its source, and what makes its element. */
function* blocks(lines, depth = 0) {
	for (let at = 0; at < lines.length;) {
		const first = lines[at], begin = at++;
		const take = isMore => {
			while (at < lines.length && isMore(lines[at])) at++;
			return lines.slice(begin, at);
		};
		let make, match;
		if (!first.trim()) continue;
		if ((match = FENCE.exec(first))) {
			const code = take(line => !line.trim().startsWith(match[1])).slice(1).join("\n");
			at++;
			make = () => el("pre", { tabIndex: 0 }, el("code", {}, code));
		} else if ((match = HEADING.exec(first))) {
			make = () => el(`h${Math.min(6, match[1].length + 2)}`, {}, ...inline(match[2]));
		} else if (RULE.test(first)) {
			make = () => el("hr");
		} else if (QUOTE.test(first) && depth < DEPTH) {
			const inner = take(line => QUOTE.test(line)).map(line => line.replace(QUOTE, ""));
			make = () => el("blockquote", {}, ...elements(inner, depth + 1));
		} else if (ITEM.test(first) && depth < DEPTH) {
			const kind = line => ITEM.exec(line)?.[2].at(-1);
			const goesOn = line => line?.startsWith("  ") || kind(line) === kind(first);
			const inner = take(line => goesOn(line) || !line.trim() && goesOn(lines[at + 1]));
			make = () => list(inner, depth);
		} else if (TABLE.test(lines[at])) {
			const [head, , ...rows] = take(line => line.includes("|"));
			make = () => el("table", { tabIndex: 0 }, row(head, "th"), ...rows.map(line => row(line, "td")));
		} else {
			const isMore = line => line.trim() && ![FENCE, HEADING, RULE, QUOTE, ITEM].some(start => start.test(line));
			const text = take(isMore).map(line => line.trimStart()).join("\n");
			make = () => el("p", {}, ...inline(text));
		}
		yield { source: lines.slice(begin, at).join("\n"), make };
	}
}

const elements = (lines, depth) => Array.from(blocks(lines, depth), block => block.make());

function list(lines, depth) {
	const [, indent, mark] = ITEM.exec(lines[0]);
	const items = [];
	for (const line of lines) {
		const match = ITEM.exec(line);
		if (match && match[1].length <= indent.length + 1) items.push([line.slice(match[0].length)]);
		else items.at(-1).push(line.slice(Math.min(line.search(/\S|$/), indent.length + mark.length + 1)));
	}
	const made = items.map(item => {
		const [first, ...others] = elements(item, depth + 1);
		return el("li", {}, ...(first.tagName === "P" ? first.childNodes : [first]), ...others);
	});
	return el(parseInt(mark) >= 0 ? "ol" : "ul", { start: parseInt(mark) }, ...made);
}

function row(line, tag) {
	const cells = line.trim().replace(/^\||\|$/g, "").split("|");
	return el("tr", {}, ...cells.map(cell => el(tag, {}, ...inline(cell.trim()))));
}

// Spans are bounded, so that no text takes long.
const INLINE = new RegExp([
	/\\([!-/:-@[-`{-~])/, // an escaped character
	/(?<!`)(`+)(?!`)([^]{1,2000}?)(?<!`)\2(?!`)/, // code
	/!?\[([^\][]{1,500})\]\(([^\s()]{1,2000}(?:\([^\s()]{0,200}\))?)\)/, // a link
	/(\*\*|\b__)(?=\S)([^]{0,2000}?\S)\6(?!\*)/, // bold
	/(\*|\b_)(?=[^\s*_])([^]{0,2000}?[^\s*])\8(?!\w)/, // italic
	/(https?:\/\/[^\s<>]{1,2000}[^\s<>.,;:!?)\]*_])/, // an address
	/(?: {2,}|\\)\n/, // a line break
].map(part => part.source).join("|"), "g");

function inline(text, depth = 0) {
	const parts = [];
	let end = 0;
	for (const match of depth < DEPTH ? text.matchAll(INLINE) : []) {
		const [whole, escaped, , code, label, url, , bold, , italic, address] = match;
		const inner = span => inline(span, depth + 1);
		parts.push(text.slice(end, match.index));
		end = match.index + whole.length;
		if (escaped) parts.push(escaped);
		else if (code) parts.push(el("code", {}, code));
		else if (label) parts.push(link(url, inner(label), whole));
		else if (bold) parts.push(el("strong", {}, ...inner(bold)));
		else if (italic) parts.push(el("em", {}, ...inner(italic)));
		else if (address) parts.push(link(address, [address]));
		else parts.push(el("br"));
	}
	return [...parts, text.slice(end)];
}

/** A link to the web; with another scheme it stays text. */
function link(href, children, source) {
	const isWeb = /^https?:\/\//i.test(href);
	return isWeb ? el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children) : source;
}

/** Shows a text. Blocks that did not change stay: a growing answer costs its last block only. */
function showMarkdown(box, text) {
	let at = 0;
	for (const { source, make } of blocks(text.split("\n"))) {
		const old = box.children[at++];
		if (old?.source === source) continue;
		const made = Object.assign(make(), { source });
		if (old) old.replaceWith(made);
		else box.append(made);
	}
	while (box.children.length > at) box.lastChild.remove();
}

// ---- The server ----

class Problem extends Error {} // its message is for the user

const authorization = () => {
	const key = sessionStorage.apiKey;
	return key && { Authorization: `Bearer ${key}` };
};

function requestBody() {
	const isSaid = ({ page, content, reasoning_content }) => !page || page.called || content || reasoning_content;
	const wire = ({ page, ...message }) => page?.called === false ? { ...message, tool_calls: undefined } : message;
	const system = settings.system ? [{ role: "system", content: settings.system }] : [];
	return JSON.stringify({
		messages: [...system, ...messages.filter(isSaid).map(wire)],
		stream: true,
		stream_options: { include_usage: true },
		reasoning_effort: settings.thinking || undefined,
		temperature: settings.temperature ? Number(settings.temperature) : undefined,
		tools: settings.tools ? JSON.parse(settings.tools) : undefined,
	});
}

/** The response, once the server takes the request. */
async function send(body, signal) {
	for (;;) {
		const headers = { "Content-Type": "application/json", ...authorization() };
		const response = await fetch("v1/chat/completions", { method: "POST", headers, body, signal });
		if (response.ok) return response;
		if (response.status === 401) {
			if (!await askKey()) throw new Problem("The server wants an API key.");
		} else if (response.status === 429) {
			const seconds = Math.max(1, Number(response.headers.get("Retry-After")) || 5);
			say(`The server is busy: trying again in ${seconds} s.`);
			await new Promise(resolve => {
				setTimeout(resolve, seconds * 1000);
				signal.onabort = resolve;
			});
		} else {
			const { error } = await response.json().catch(() => ({}));
			throw new Problem(`The server answered ${response.status}: ${error?.message ?? response.statusText}`);
		}
	}
}

/** The data of each event of a stream; "" for a comment. */
async function* events(response) {
	const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
	let rest = "";
	for (let part; !(part = await reader.read()).done;) {
		const lines = (rest + part.value).split(/\r?\n/);
		rest = lines.pop();
		for (const line of lines) {
			if (line.startsWith(":")) yield "";
			if (line.startsWith("data:")) yield line.slice(5).trim();
		}
	}
}

/** Reads an answer into `message`; `changed` is called after each part. */
async function receive(message, signal, changed) {
	let usage, timings, begun, parts = 0;
	for await (const data of events(await send(requestBody(), signal))) {
		if (data === "[DONE]") return;
		if (!data) say("Reading the prompt…");
		const chunk = JSON.parse(data || "{}");
		if (chunk.error) throw new Problem(`The server failed: ${chunk.error.message}`);
		const { delta = {}, finish_reason } = chunk.choices?.[0] ?? {};
		if (delta.reasoning_content || delta.content || delta.tool_calls) {
			begun ??= performance.now();
			parts++;
			say(delta.reasoning_content ? "Thinking…" : "Answering…");
		}
		message.reasoning_content += delta.reasoning_content ?? "";
		message.content += delta.content ?? "";
		for (const { index, id, function: { name = "", arguments: json = "" } } of delta.tool_calls ?? []) {
			message.tool_calls ??= [];
			const call = message.tool_calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
			call.function.name += name;
			call.function.arguments += json;
		}
		usage = chunk.usage ?? usage;
		timings = chunk.timings ?? timings;
		message.page.called ||= finish_reason === "tool_calls";
		message.page.isCut ||= finish_reason === "length";
		if (parts) message.page.figures = figuresOf(usage, timings, parts, (performance.now() - begun) / 1000);
		changed();
	}
	throw new Error("the stream ended early");
}

/** What an answer took; about, until the server tells. */
function figuresOf(usage, timings, parts, seconds) {
	const rate = fixed(timings?.predicted_per_second ?? (parts - 1) / (seconds || 1));
	if (!usage) return `about ${rate} t/s`;
	const { completion_tokens, prompt_tokens, prompt_tokens_details: details } = usage;
	const known = count(details?.cached_tokens ?? 0);
	return `${count(completion_tokens)} tokens, ${rate} t/s · prompt ${count(prompt_tokens)} tokens, ${known} known`;
}

// ---- What is shown ----

/** Shows a line that is announced; the same is announced once. */
function say(text) {
	if ($("status").textContent !== text) $("status").textContent = text;
}

const root = document.documentElement;
const scrollToEnd = () => scrollTo(0, root.scrollHeight);

/** Changes the document; who is at its end stays there. */
function followEnd(change) {
	const isAtEnd = innerHeight + scrollY > root.scrollHeight - 60;
	change();
	if (isAtEnd) scrollToEnd();
}

function copy(text) {
	document.oncopy = event => {
		event.preventDefault();
		event.clipboardData.setData("text/plain", text);
	};
	document.execCommand("copy"); // navigator.clipboard needs a secure origin
	document.oncopy = null;
	say("Copied.");
}

/** Shows a message at the end; returns what shows an answer anew. */
function show(message) {
	const { role, content } = message;
	const name = { user: "You", assistant: "infall", tool: "Result" }[role];
	const article = el("article", { className: role }, el("h2", {}, name));
	$("messages").append(article);
	if (role === "assistant") return showAnswer(message, article);
	article.append(role === "tool" ? el("pre", { tabIndex: 0 }, content) : el("div", { className: "text" }, content));
}

function showAnswer(message, article) {
	const summary = el("summary"), thought = el("div", { className: "thought" });
	const thinking = el("details", {}, summary, thought);
	const answer = el("div"), calls = el("div"), note = el("p", { className: "note" }), figures = el("span");
	const buttons = [
		el("button", { onclick: () => copy(message.content) }, "Copy"),
		el("button", { onclick: again }, "Answer again"),
	];
	article.append(thinking, answer, calls, note, el("div", { className: "foot" }, ...buttons, figures));
	const update = () => {
		const { reasoning_content, content, tool_calls = [], page } = message;
		const isRunning = message === current;
		const thinks = isRunning && !content && !tool_calls.length;
		thinking.hidden = !reasoning_content;
		thought.textContent = reasoning_content;
		summary.textContent = `${thinks ? "Thinking…" : "Thoughts:"} ${count(reasoning_content.length)} characters`;
		showMarkdown(answer, content);
		calls.replaceChildren(...tool_calls.map(showCall));
		if (isPending(message)) calls.append(resultForm(tool_calls));
		note.hidden = isRunning || !page.note;
		note.textContent = page.note;
		figures.textContent = page.figures ?? "";
		figures.classList.toggle("running", isRunning);
		for (const button of buttons) button.hidden = isRunning;
	};
	update();
	return update;
}

function showCall({ function: { name, arguments: json } }) {
	try { json = JSON.stringify(JSON.parse(json), null, 2); } catch { /* not whole yet */ }
	return el("div", { className: "call" }, "Calls ", el("code", {}, name), el("pre", { tabIndex: 0 }, json));
}

/** Whether an answer waits for the results of its calls. */
const isPending = message => message?.page?.called && message !== current && message === messages.at(-1);

function resultForm(calls) {
	const boxes = calls.map(() => el("textarea", { rows: 3, className: "code result" }));
	const labels = calls.map((call, index) => el("label", {}, `Result of ${call.function.name}`, boxes[index]));
	const onsubmit = event => {
		event.preventDefault();
		event.target.remove();
		ask(...calls.map(({ id }, index) => ({ role: "tool", tool_call_id: id, content: boxes[index].value })));
	};
	return el("form", { className: "call", onsubmit }, ...labels, el("button", { className: "main" }, "Send on"));
}

function showAll() {
	$("messages").replaceChildren();
	messages.forEach(show);
	scrollToEnd();
}

// ---- The conversation ----

let current = null; // the answer under way
let controller; // what stops it

const stop = () => current && controller.abort();

function setCurrent(message) {
	current = message;
	$("send").textContent = message ? "Stop" : "Send";
}

/** Adds messages and has them answered. */
async function ask(...added) {
	const page = { called: false, note: "Interrupted." };
	const message = { role: "assistant", content: "", reasoning_content: "", page };
	messages.push(...added, message);
	save();
	setCurrent(message);
	controller = new AbortController();
	const { signal } = controller;
	added.forEach(show);
	const update = show(message);
	scrollToEnd();
	say("Waiting for the server…");

	let frame, end = "Answered.";
	const changed = () => {
		frame ??= requestAnimationFrame(() => { frame = null; followEnd(update); });
	};
	try {
		await receive(message, signal, changed);
		if (page.called) end = "Waiting for the results of calls.";
		page.note = page.isCut ? "Cut at the limit of length." : "";
	} catch (error) {
		const told = error instanceof Problem ? error.message : `The connection was lost: ${error.message}.`;
		end = page.note = signal.aborted ? "Stopped." : told;
	}
	setCurrent(null);
	followEnd(update);
	say(end);
	$("spoken").textContent = message.content.slice(0, 2000);
	save();
}

/** Asks for another last answer. */
function again() {
	messages.pop();
	showAll();
	ask();
}

$("composer").onsubmit = event => {
	event.preventDefault();
	const content = $("text").value;
	if (current) return stop();
	if (isPending(messages.at(-1))) return document.querySelector(".result").focus();
	if (!content.trim()) return;
	$("text").value = "";
	ask({ role: "user", content });
};
$("text").onkeydown = event => {
	if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
	event.preventDefault();
	if (!current) $("composer").requestSubmit();
};
document.onkeydown = event => {
	if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
};
$("new").onclick = () => {
	if (messages.length && !confirm("Drop this conversation?")) return;
	stop();
	messages = [];
	save();
	showAll();
	$("text").focus();
};

// ---- Settings, key, theme ----

/** Opens a dialog; returns the value of the button that closed it. */
function open(dialog) {
	dialog.returnValue = "";
	dialog.showModal();
	return new Promise(resolve => { dialog.onclose = () => resolve(dialog.returnValue); });
}

$("open-settings").onclick = async () => {
	const names = ["system", "thinking", "temperature", "tools"];
	for (const name of names) $(name).value = settings[name] ?? "";
	const choice = await open($("settings"));
	if (choice === "save") {
		settings = Object.fromEntries(names.map(name => [name, $(name).value.trim()]));
		store("settings", settings);
	}
	if (choice === "clear" && confirm("Remove conversation, settings, key?")) {
		messages = [];
		localStorage.clear();
		sessionStorage.clear();
		location.reload();
	}
};
$("tools").oninput = ({ target }) => {
	let isArray = false;
	try { isArray = Array.isArray(JSON.parse(target.value || "[]")); } catch {}
	target.setCustomValidity(isArray ? "" : "This is not a JSON array.");
};

/** Asks for the API key; whether one was given. */
async function askKey() {
	if (await open($("key-dialog")) !== "use") return false;
	sessionStorage.apiKey = $("key").value.trim();
	$("key").value = "";
	isRefused = false;
	return true;
}

const systemDark = matchMedia("(prefers-color-scheme: dark)");
function showTheme() {
	const theme = load("theme", systemDark.matches ? "dark" : "light");
	root.dataset.theme = theme;
	$("theme").ariaPressed = theme === "dark";
}
systemDark.onchange = showTheme;
$("theme").onclick = () => {
	store("theme", root.dataset.theme === "dark" ? "light" : "dark");
	showTheme();
};

// ---- Figures of the server, every 2 seconds while the page is seen ----

let isRefused = false;
let before = {};

async function get(path) {
	const response = await fetch(path, { headers: authorization() });
	isRefused ||= response.status === 401;
	if (!response.ok) throw new Problem();
	return response;
}

/** Prometheus' text to numbers by name; labels are summed up. */
function parseMetrics(text) {
	const sums = {};
	for (const [, name, value] of text.matchAll(/^infall_(\w+)(?:{.*})? (\S+)/gm)) {
		sums[name] = (sums[name] ?? 0) + Number(value);
	}
	return sums;
}

/** What is missing, or stands still where a rate is told, makes a NaN, and is left out. */
function figures(now) {
	const rate = name => (now[name] - before[name]) / 2 || NaN;
	return [
		`${count(now.requests_active)} active, ${count(now.requests_waiting)} waiting`,
		`reading ${fixed(rate("prefill_tokens_total"))} t/s`,
		`writing ${fixed(rate("decode_tokens_total"))} t/s`,
		`experts: ${count(now.experts_hits_total)} found, ${count(now.experts_misses_total)} read`,
		`${gib(now.experts_read_bytes_total)} from disk`,
		`${gib(rate("experts_read_bytes_total"))}/s`,
		`memory ${gib(now.memory_bytes)}`,
	].filter(part => !part.includes("NaN")).join(" · ");
}

async function poll() {
	if (document.hidden || isRefused) return before = {};
	try {
		if (!$("server").textContent) {
			const { model, device, precision, experts, context_tokens: context } = await (await get("props")).json();
			const parts = [model, device, precision, experts, context && `${count(context)} tokens of context`];
			$("server").textContent = parts.filter(Boolean).join(" · ");
		}
		const now = parseMetrics(await (await get("metrics")).text());
		$("figures").textContent = figures(now);
		before = now;
	} catch (error) {
		before = {};
		$("figures").textContent = error instanceof Problem ? "" : "The server cannot be reached.";
	}
}

showTheme();
showAll();
onpagehide = save;
document.onvisibilitychange = () => { save(); poll(); };
setInterval(poll, 2000);
poll();
