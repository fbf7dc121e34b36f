// The server's dashboard. First what computes: text and numbers in, values out, nothing of the page. Then the page: all
// that the server says goes in as text, never as HTML. Importing this module does nothing where there is no document.

/** Samples of OpenMetrics text: `[{ name, labels, value }]`. */
export function parseMetrics(text) {
    const line = /^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? (\S+)/;
    const label = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
    const unescaped = (value) => value.replace(/\\(.)/g, (_, escaped) => (escaped === "n" ? "\n" : escaped));
    const samples = [];
    for (const row of text.split("\n")) {
        const [, name, labels = "", value] = line.exec(row) ?? [];
        if (!name) continue;
        const pairs = [...labels.matchAll(label)].map(([, key, quoted]) => [key, unescaped(quoted)]);
        samples.push({ name, labels: Object.fromEntries(pairs), value: value === "+Inf" ? Infinity : Number(value) });
    }
    return samples;
}

/** The sum of all samples of a name that have these labels. */
export function total(samples, name, labels = {}) {
    const meant = (sample) => Object.entries(labels).every(([label, value]) => sample.labels[label] === value);
    return samples.filter((sample) => sample.name === name && meant(sample)).reduce((sum, { value }) => sum + value, 0);
}

/** Whether any count is lower than it was: then another server answers, and what was counted before is not of it. */
export function restarted(before, now) {
    const counts = (samples) => samples.filter(({ name }) => /_(total|count|bucket)$/.test(name));
    const series = ({ name, labels }) => JSON.stringify([name, labels]);
    const found = new Map(counts(now).map((sample) => [series(sample), sample.value]));
    return counts(before).some((sample) => (found.get(series(sample)) ?? 0) < sample.value);
}

/** Rows `{ guard, gate, fired, blocked }` of the table of gates; `blocked` is the guard's, on its first row alone. */
export function firings(samples) {
    const counts = samples.filter(({ name }) => name === "pilotfish_gate_fired_total");
    const rows = counts.map(({ labels, value }) => ({
        guard: labels.guard,
        gate: labels.gate,
        fired: value,
        blocked: null,
    }));
    rows.sort((a, b) => a.guard.localeCompare(b.guard) || a.gate.localeCompare(b.gate));
    for (const { name, labels, value } of samples) {
        if (name !== "pilotfish_blocked_total") continue;
        const row = rows.find(({ guard }) => guard === labels.guard);
        if (row) row.blocked = value;
        else rows.push({ guard: labels.guard, gate: null, fired: 0, blocked: value });
    }
    return rows;
}

/** Buckets of a histogram by their upper bound, as counted up: `[{ bound, count }]`. */
export function histogram(samples, name) {
    const buckets = samples.filter((sample) => sample.name === `${name}_bucket`);
    const bound = (le) => (le === "+Inf" ? Infinity : Number(le));
    return buckets
        .map(({ labels, value }) => ({ bound: bound(labels.le), count: value }))
        .sort((a, b) => a.bound - b.bound);
}

/** What was counted between two readings of a histogram. */
export function countedSince(before, now) {
    const earlier = new Map(before.map(({ bound, count }) => [bound, count]));
    return now.map(({ bound, count }) => ({ bound, count: count - (earlier.get(bound) ?? 0) }));
}

/** A quantile, by interpolation within its bucket. Beyond the last bound it is infinite; of nothing it is null. */
export function quantile(buckets, share) {
    const counted = buckets.at(-1)?.count ?? 0;
    if (!(counted > 0)) return null;
    const rank = share * counted;
    const index = buckets.findIndex(({ count }) => count >= rank && count > 0);
    const { bound, count } = buckets[index];
    if (bound === Infinity) return Infinity;
    const below = index > 0 ? buckets[index - 1] : { bound: 0, count: 0 };
    return below.bound + ((bound - below.bound) * (rank - below.count)) / (count - below.count);
}

/** What `[[time, count], …]` went up by in a second over its last `span` seconds; null of a single reading. */
export function meanRate(readings, span) {
    const last = readings.at(-1);
    const first = readings.find(([time]) => last[0] - time <= span);
    return first && last[0] > first[0] ? (last[1] - first[1]) / (last[0] - first[0]) : null;
}

/**
 * Paths of a chart of `[[time, value], …]` that ends at `now`: a line, and the area below it. Both are broken where
 * nothing was read for `gap` seconds.
 */
export function sparkline(points, { now, span, gap, width, height, peak }) {
    const x = (time) => (width * (1 - (now - time) / span)).toFixed(1);
    const y = (value) => (height - 1 - (height - 3) * (value / (peak || 1))).toFixed(1);
    const runs = [];
    for (const point of points.filter(([time]) => now - time <= span)) {
        const run = runs.at(-1);
        if (run && point[0] - run.at(-1)[0] <= gap) run.push(point);
        else runs.push([point]);
    }
    const steps = (run) => run.map(([time, value]) => `${x(time)} ${y(value)}`).join("L");
    const area = (run) => `M${x(run[0][0])} ${height}L${steps(run)}L${x(run.at(-1)[0])} ${height}Z`;
    return { line: runs.map((run) => `M${steps(run)}`).join(""), area: runs.map(area).join("") };
}

/** Takes text as it comes and gives the data of each server-sent event that is whole. */
export function eventReader() {
    let rest = "";
    const data = (event) => {
        const lines = event.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
        return lines.length ? lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n") : null;
    };
    return (text) => {
        const events = (rest + text).split(/\r\n\r\n|\n\n|\r\r/);
        rest = events.pop();
        return events.map(data).filter((found) => found !== null);
    };
}

/** An answer before any of it has come. */
export const emptyAnswer = () => ({
    pieces: [],
    done: false,
    finish: null,
    refusal: null,
    gates: [],
    blockedBy: null,
    guard: null,
    usage: null,
});

/** An answer with one more chunk of its stream. */
export function withChunk(answer, chunk) {
    const next = { ...answer, guard: chunk.guard ?? answer.guard, usage: chunk.usage ?? answer.usage };
    const [choice] = chunk.choices ?? [];
    if (!choice) return next;
    const { content, refusal } = choice.delta ?? {};
    if (content) next.pieces = [...answer.pieces, content];
    if (refusal) next.refusal = (answer.refusal ?? "") + refusal;
    if (choice.finish_reason) Object.assign(next, { finish: choice.finish_reason, done: true });
    if (choice.guard)
        Object.assign(next, { gates: choice.guard.gates ?? [], blockedBy: choice.guard.blocked_by ?? null });
    return next;
}

/**
 * At which piece of each of two answers their texts part: the number of its pieces where one has ended. Null while that
 * can't be told, where they are the same, and where one has no text at all.
 */
export function firstDifference(one, other) {
    const [a, b] = [one.pieces.join(""), other.pieces.join("")];
    const shorter = Math.min(a.length, b.length);
    if (!shorter) return null;
    let same = 0;
    while (same < shorter && a[same] === b[same]) same += 1;
    const hasEnded = a.length < b.length ? one.done : other.done;
    if (same === shorter && (a.length === b.length || !hasEnded)) return null;
    const pieceAt = (pieces) => {
        let end = 0;
        const index = pieces.findIndex((piece) => (end += piece.length) > same);
        return index < 0 ? pieces.length : index;
    };
    return [pieceAt(one.pieces), pieceAt(other.pieces)];
}

/** How far from the threshold a token's colour is full: 9 of 10 of these scores are nearer. */
export function fullColour(scores, threshold) {
    const distances = scores.filter((score) => score !== null).map((score) => Math.abs(score - threshold));
    distances.sort((a, b) => a - b);
    return distances[Math.ceil(distances.length * 0.9) - 1] || 1;
}

/** Parts of a text that are blank, each a kind of blank, and parts that are not: `[{ kind, text }]`. */
export function blanks(text) {
    const kinds = { "\n": "newline", "\r": "newline", "\t": "tab", " ": "space" };
    const parts = text.match(/\r\n|[\n\r\t ]|[^\n\r\t ]+/g) ?? [];
    return parts.map((part) => ({ kind: kinds[part[0]] ?? "word", text: part }));
}

/** What an intervention is set to: what is in force of it, or would be if its guard were enabled. */
export function strengthOf({ name, strength, strength_of_guard: own }, settings) {
    if (strength !== null) return strength;
    const covers = (setting) => setting === name || name.startsWith(`${setting}.`);
    const setting = settings[Object.keys(settings).filter(covers).sort().at(-1)];
    if (setting === undefined) return own;
    if (setting === "on") return own || 1;
    return setting === "off" ? 0 : setting;
}

/**
 * What makes an intervention its guard's own again; undefined where it is. What was set for a group can't be taken back
 * for one of it alone.
 */
export function resetOf(name, settings) {
    const isOfGroup = Object.keys(settings).some((setting) => name.startsWith(`${setting}.`));
    if (isOfGroup) return settings[name] === "on" ? undefined : "on";
    return name in settings ? null : undefined;
}

/** A guard's state: its kind, and in words. */
export function stateOf(guard) {
    if (guard.problem && guard.in_force)
        return { kind: "problem", words: "as it was before: the folder has a problem" };
    if (guard.problem) return { kind: "problem", words: "not in force: the folder has a problem" };
    if (guard.in_force) return { kind: "ok", words: "in force" };
    return { kind: "off", words: guard.enabled ? "not in force" : "disabled" };
}

/** A number for reading: three digits that count, or all of those before the point. */
export function shown(value) {
    if (value === null || value === undefined) return "–";
    const rounded = Math.abs(value) >= 100 ? Math.round(value) : Number(value.toPrecision(3));
    return rounded.toLocaleString("en", { maximumSignificantDigits: 15 });
}

/** A score or a threshold, in standard deviations. */
export const score = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));

export function duration(seconds) {
    if (seconds === null) return "–";
    if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
    if (seconds < 60) return `${shown(seconds)} s`;
    const [minutes, hours, days] = [60, 3600, 86400].map((unit) => Math.floor(seconds / unit));
    if (days) return `${days} d ${hours % 24} h`;
    return hours ? `${hours} h ${minutes % 60} min` : `${minutes} min`;
}

/** The server's no, in its own words. */
class Refused extends Error {
    constructor(status, message) {
        super(message);
        this.status = status;
    }
}

/** No answer, or not all of it. */
class Lost extends Error {}

const KEY = "pilotfish-key";
const brought = () => sessionStorage.getItem(KEY);

async function reach(path, { method = "GET", body, signal } = {}) {
    const headers = {};
    if (brought()) headers.Authorization = `Bearer ${brought()}`;
    if (body) headers["Content-Type"] = "application/json";
    try {
        return await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
    } catch (error) {
        throw lost(error);
    }
}

const lost = (error) => (error.name === "AbortError" ? error : new Lost("the server does not answer"));

async function textOf(response) {
    try {
        return await response.text();
    } catch (error) {
        throw lost(error);
    }
}

async function refusal(response) {
    const text = await textOf(response);
    let message;
    try {
        message = JSON.parse(text).error.message;
    } catch {
        message = `the server answers with ${response.status}, and no words`;
    }
    return new Refused(response.status, message);
}

async function jsonOf(response) {
    const text = await textOf(response);
    try {
        return JSON.parse(text);
    } catch {
        throw new Lost("what answers is not the server");
    }
}

async function json(path, options) {
    const response = await reach(path, options);
    if (!response.ok) throw await refusal(response);
    return jsonOf(response);
}

/** A poll that does not answer in this time is given up. */
const patience = () => AbortSignal.timeout(10_000);

/**
 * Runs `task` every `period` ms, never twice at once, and not while the page is hidden. What it returns has it run now,
 * or as soon as it has ended.
 */
function poll(period, task) {
    let isRunning = false;
    let isWanted = false;
    let timer;
    const run = async () => {
        clearTimeout(timer);
        isWanted = isRunning;
        if (isRunning || document.hidden) return;
        isRunning = true;
        const due = performance.now() + period;
        try {
            await task();
        } finally {
            isRunning = false;
            timer = setTimeout(run, isWanted ? 0 : Math.max(0, due - performance.now()));
        }
    };
    document.addEventListener("visibilitychange", run);
    run();
    return run;
}

const at = (id) => document.getElementById(id);

/** An element with properties (`class`, `aria-…` and `data-…` being attributes) and children: nodes, or text. */
function h(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
        if (/^(aria|data)-|^(class|scope|role|colspan)$/.test(name)) node.setAttribute(name, value);
        else node[name] = value;
    }
    node.append(...children);
    return node;
}

function say(node, text) {
    if (node.textContent !== text) node.textContent = text;
}

const last = new WeakMap();

/** Fills `node` anew where `value` is not what it shows. */
function show(node, value, build) {
    const text = JSON.stringify(value);
    if (last.get(node) === text) return;
    last.set(node, text);
    node.replaceChildren(...build(value));
}

function row(...cells) {
    return h("tr", {}, ...cells.map((cell) => (cell instanceof HTMLTableCellElement ? cell : h("td", {}, cell))));
}

const number = (value) => h("td", { class: "number" }, typeof value === "string" ? value : shown(value));
const nothing = (columns, words) => [h("tr", {}, h("td", { class: "note", colspan: columns }, words))];

/** Says whether the server can be reached. */
function connection(onReturn) {
    let isLost = false;
    return async (task) => {
        try {
            await task();
            if (!isLost) return;
            isLost = false;
            say(at("connection"), "");
            document.body.classList.remove("lost");
            onReturn();
        } catch (error) {
            if (!(error instanceof Lost)) throw error;
            if (isLost) return;
            isLost = true;
            const since = new Date().toLocaleTimeString();
            const words = `The server has not answered since ${since}. Trying again; what is shown is from before.`;
            say(at("connection"), words);
            document.body.classList.add("lost");
            at("health").className = "pill problem";
            say(at("health"), "unreachable");
        }
    };
}

async function readHealth() {
    const health = await jsonOf(await reach("/health", { signal: patience() }));
    const kind = health.status === "ok" ? "ok" : "problem";
    at("health").className = `pill ${kind}`;
    say(at("health"), health.status);
    say(at("model"), health.model);
    say(at("epoch"), String(health.epoch));
    say(at("uptime"), duration(Math.max(1, health.uptime_seconds)));
    document.title = `${health.status === "ok" ? "" : `${health.status} · `}${health.model} · Pilotfish`;
    const problems = Object.entries(health.problems);
    if (health.problem) problems.push(["all guards together", health.problem]);
    show(at("problems"), problems, () => {
        if (!problems.length) return [];
        const list = problems.flatMap(([folder, problem]) => [h("dt", {}, folder), h("dd", {}, problem)]);
        return [h("p", {}, "What the guards' directory holds could not all be taken:"), h("dl", {}, ...list)];
    });
}

/** A reader of `/metrics` that shows what it reads. */
function metricsReader() {
    const [span, mean] = [120, 10];
    let before = [];
    let firstToken;
    let answers = [];
    let prompts = [];
    let rates = [];

    const showRates = (samples, now) => {
        const reading = (readings, name) =>
            [...readings, [now, total(samples, name)]].filter(([time]) => now - time <= span);
        answers = reading(answers, "pilotfish_answer_tokens_total");
        prompts = reading(prompts, "pilotfish_prompt_tokens_total");
        const rate = meanRate(answers, mean);
        say(at("answer-rate"), shown(rate));
        say(at("prompt-rate"), shown(meanRate(prompts, mean)));
        rates = [...rates.filter(([time]) => now - time <= span), ...(rate === null ? [] : [[now, rate]])];
        const peak = Math.max(0, ...rates.map(([, value]) => value));
        const paths = sparkline(rates, { now, span, gap: 5, width: 240, height: 48, peak });
        const chart = at("sparkline");
        chart.querySelector(".line").setAttribute("d", paths.line);
        chart.querySelector(".area").setAttribute("d", paths.area);
        chart.setAttribute(
            "aria-label",
            `Tokens of answers a second, the last two minutes: now ${shown(rate)}, at most ${shown(peak)}`,
        );
        say(at("peak"), peak > 0 ? `peak ${shown(peak)}` : "");
    };

    const showLatency = (samples) => {
        const found = histogram(samples, "pilotfish_first_token_seconds");
        firstToken ??= found;
        const counted = countedSince(firstToken, found);
        const words = (share) => {
            const value = quantile(counted, share);
            return value === Infinity ? `over ${duration(counted.at(-2)?.bound ?? 0)}` : duration(value);
        };
        say(at("median"), words(0.5));
        say(at("p95"), words(0.95));
    };

    const showCounts = (samples) => {
        const count = (id, name, labels) => say(at(id), shown(total(samples, `pilotfish_${name}`, labels)));
        count("running", "requests_running");
        count("waiting", "requests_waiting");
        count("blocked", "blocked_total");
        count("faults", "faults_total");
        count("reloads", "reloads_total");
        count("refused", "reloads_total", { outcome: "refused" });
        const requests = samples.filter(({ name }) => name === "pilotfish_requests_total");
        requests.sort((a, b) => a.labels.status - b.labels.status || a.labels.route.localeCompare(b.labels.route));
        const answered = ({ labels, value }) =>
            row(labels.status, h("td", {}, h("code", {}, labels.route)), number(value));
        show(at("requests"), requests, () => (requests.length ? requests.map(answered) : nothing(3, "none yet")));
        const rows = firings(samples);
        const fired = ({ guard, gate, fired, blocked }) =>
            row(guard, gate ?? "–", number(fired), number(blocked ?? ""));
        show(at("firings"), rows, () => (rows.length ? rows.map(fired) : nothing(4, "none yet")));
    };

    return async () => {
        const response = await reach("/metrics", { signal: patience() });
        if (!response.ok) return;
        const samples = parseMetrics(await textOf(response));
        if (restarted(before, samples)) {
            [answers, prompts] = [[], []];
            firstToken = [];
        }
        before = samples;
        showRates(samples, performance.now() / 1000);
        showLatency(samples);
        showCounts(samples);
    };
}

/** Sends a control's changes one after the other, of those that wait the last alone. `error` tells what goes wrong. */
function changer(change, error, onSettled) {
    let waiting = null;
    let isBusy = false;
    return {
        get isBusy() {
            return isBusy;
        },
        async ask(body) {
            waiting = body;
            if (isBusy) return;
            isBusy = true;
            say(error, "");
            while (waiting) {
                const next = waiting;
                waiting = null;
                try {
                    await change(next);
                } catch (problem) {
                    waiting = null;
                    say(error, `Not changed: ${problem.message}`);
                }
            }
            isBusy = false;
            onSettled();
        },
    };
}

/** The controls of an intervention. */
function interventionRow(name, change, onSettled) {
    const on = h("input", { type: "checkbox", role: "switch", "aria-label": `${name} on` });
    const slider = h("input", { type: "range", min: 0, max: 200, step: 1, "aria-label": `strength of ${name}` });
    const value = h("span", {});
    const reset = h("button", { type: "button", "aria-label": `${name} as the guard has it` }, "As the guard has it");
    const error = h("p", { class: "error", role: "alert" });
    const facts = h("span", { class: "note" });
    const changes = changer(change, error, onSettled);
    const set = (setting) => changes.ask({ interventions: { [name]: setting } });
    let unit = 1;
    let back;
    let isHeld = false;
    const chosen = () => (unit * slider.valueAsNumber) / 100;
    const tell = (strength) => {
        const words = `${shown(strength)} · ${Math.round((100 * strength) / unit)} %`;
        say(value, words);
        slider.setAttribute("aria-valuetext", words);
    };
    slider.addEventListener("input", () => {
        isHeld = true;
        tell(chosen());
    });
    slider.addEventListener("change", () => {
        isHeld = false;
        set(chosen());
    });
    for (const end of ["pointerup", "blur"]) slider.addEventListener(end, () => (isHeld = false));
    on.addEventListener("change", () => set(on.checked ? "on" : "off"));
    reset.addEventListener("click", () => set(back));
    const node = h(
        "li",
        { class: "intervention", "data-intervention": name },
        h("div", { class: "name" }, h("strong", {}, name), facts),
        h("label", { class: "switch" }, on, "on"),
        h("div", { class: "strength" }, slider, value),
        reset,
        error,
    );
    const update = (intervention, settings) => {
        const { kind, layer, when, strength_of_guard: own } = intervention;
        say(facts, `${kind} at layer ${layer}${when ? `, when ${when}` : ""}; own strength ${shown(own)}`);
        unit = own || 1;
        back = resetOf(name, settings);
        reset.disabled = back === undefined;
        if (changes.isBusy || isHeld) return;
        const strength = strengthOf(intervention, settings);
        on.checked = strength !== 0;
        slider.value = (100 * strength) / unit;
        tell(strength);
    };
    return { node, update };
}

/** A guard of the list. `change` is told what is to be changed of it. */
function guardCard(folder, change, onSettled) {
    const part = (tag, className) => h(tag, { class: className });
    const enabled = h("input", { type: "checkbox", role: "switch" });
    const [name, state, description] = [part("h3", ""), part("span", "pill"), part("p", "description")];
    const [problem, error, facts, gates] = [
        part("p", "banner"),
        part("p", "error"),
        part("dl", "facts"),
        part("tbody", ""),
    ];
    const [controls, results] = [part("ul", "interventions"), part("tbody", "")];
    error.setAttribute("role", "alert");
    const head = (...cells) => h("thead", {}, h("tr", {}, ...cells.map((cell) => h("th", { scope: "col" }, cell))));
    const scroll = (label, ...children) =>
        h("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": label }, h("table", {}, ...children));
    const gateTable = scroll(`Gates of ${folder}`, head("Gate", "Reads", "Layer", "Threshold", "When it fires"), gates);
    const measured = h(
        "details",
        {},
        h("summary", {}, "Measured results"),
        scroll(`Results of ${folder}`, head("What", "Value", "On"), results),
    );
    const fieldset = h("fieldset", {}, h("legend", {}, "Interventions"), controls);
    const changes = changer(change, error, onSettled);
    enabled.addEventListener("change", () => changes.ask({ enabled: enabled.checked }));
    const node = h(
        "article",
        { class: "panel guard", "data-guard": folder },
        h("div", { class: "guard-head" }, name, state, h("label", { class: "switch" }, enabled, "enabled")),
        error,
        description,
        problem,
        facts,
        gateTable,
        fieldset,
        measured,
    );
    let rows = [];
    const gateRow = (gate) =>
        row(
            gate.name,
            gate.reads,
            number(gate.layer),
            number(score(gate.threshold)),
            gate.on_fire === "block" ? "blocks" : "steers",
        );
    const resultRow = ({ name, value, on, command }) =>
        row(name, number(value), h("td", {}, on, ...(command ? [h("br"), h("code", {}, command)] : [])));

    const update = (guard) => {
        const { kind, words } = stateOf(guard);
        say(name, guard.name ?? folder);
        enabled.setAttribute("aria-label", `${guard.name ?? folder} enabled`);
        state.className = `pill ${kind}`;
        say(state, words);
        say(description, guard.description ?? "");
        say(problem, guard.problem ?? "");
        if (!changes.isBusy) enabled.checked = guard.enabled;
        const known = [["Folder", folder]];
        if (guard.content) known.push(["Content", guard.content]);
        if (guard.target) known.push(["Made for", `${guard.target.architecture}, ${guard.target.fingerprint}`]);
        if (guard.source) known.push(["Learnt on", `${guard.source.model}, ${guard.source.fingerprint}`]);
        show(facts, known, () =>
            known.map(([term, text]) =>
                h("div", {}, h("dt", {}, term), h("dd", { class: term.toLowerCase(), title: text }, text)),
            ),
        );
        gateTable.hidden = !guard.gates?.length;
        show(gates, guard.gates ?? [], (list) => list.map(gateRow));
        measured.hidden = !guard.results?.length;
        show(results, guard.results ?? [], (list) => list.map(resultRow));
        fieldset.hidden = !guard.interventions?.length;
        fieldset.disabled = !guard.in_force;
        const interventions = guard.interventions ?? [];
        show(
            controls,
            interventions.map((intervention) => intervention.name),
            (names) => {
                rows = names.map((name) => interventionRow(name, change, onSettled));
                return rows.map((made) => made.node);
            },
        );
        rows.forEach((made, index) => made.update(interventions[index], guard.settings));
    };
    return { node, update };
}

/** The list of guards, and what reads, changes and shows it. */
function guardList(onForbidden) {
    let snapshot = null;
    let version = 0;
    let cards = new Map();

    const render = () => {
        const guards = snapshot?.data ?? [];
        const made = (folder) => guardCard(folder, (body) => change(folder, body), render);
        cards = new Map(guards.map(({ folder }) => [folder, cards.get(folder) ?? made(folder)]));
        const nodes = [...cards.values()].map((card) => card.node);
        const list = at("guard-list");
        if (nodes.length !== list.children.length || nodes.some((node, index) => node !== list.children[index])) {
            list.replaceChildren(...nodes);
        }
        guards.forEach((guard) => cards.get(guard.folder).update(guard));
        if (snapshot)
            say(
                at("guards-note"),
                guards.length
                    ? "In the order in which they act. Changes are for all requests to come."
                    : "There are no guards.",
            );
    };

    const change = async (folder, body) => {
        try {
            const path = `/v1/guards/${encodeURIComponent(folder)}`;
            snapshot = await json(path, { method: "PATCH", body, signal: patience() });
        } catch (error) {
            if (error.status === 403) onForbidden();
            throw error;
        }
        version += 1;
        render();
    };

    return {
        threshold: (guard, gate) => {
            const found = snapshot?.data
                .find((other) => other.name === guard)
                ?.gates.find((other) => other.name === gate);
            return found?.threshold ?? null;
        },
        read: async () => {
            const asked = version;
            const found = await json("/v1/guards", { signal: patience() });
            // What was changed in between is newer than this.
            if (version !== asked) return;
            snapshot = found;
            render();
        },
        clear: (words) => {
            snapshot = null;
            version += 1;
            cards = new Map();
            render();
            say(at("guards-note"), words);
        },
    };
}

const EVENTS = { start: "server began", reload: "reloaded", refused: "refused", change: "changed" };

async function readHistory() {
    const { data } = await json("/v1/guard/history", { signal: patience() });
    const problemsOf = (problems) =>
        Object.entries(problems ?? {}).map(([folder, text]) => h("p", {}, h("strong", {}, folder), ` ${text}`));
    const eventRow = ({ epoch, time, event, key, changed, problems }) => {
        const date = new Date(time * 1000);
        const isToday = date.toDateString() === new Date().toDateString();
        const words = isToday ? date.toLocaleTimeString() : date.toLocaleString();
        return row(
            h("td", {}, h("time", { dateTime: date.toISOString(), title: date.toISOString() }, words)),
            number(String(epoch)),
            h(
                "td",
                {},
                h("span", { class: `pill ${event === "refused" ? "problem" : "plain"}` }, EVENTS[event] ?? event),
            ),
            key ?? "–",
            changed?.length ? changed.join(", ") : "–",
            h("td", { class: "words" }, ...problemsOf(problems)),
        );
    };
    say(at("history-note"), "The newest first.");
    show(at("history-rows"), data, () => (data.length ? data.map(eventRow) : nothing(6, "nothing yet")));
}

/** Shows what the gates read at each token of a prompt. */
function scoreBoard(guards) {
    let result = null;
    const named = ({ guard, gate }) => `${guard}/${gate}`;

    const pieceOf = (piece, chosen, threshold, full) => {
        const found = piece.scores[chosen] ?? null;
        const text = h(
            "span",
            { class: "piece-text" },
            ...blanks(piece.text).map((part) => h("span", { class: part.kind }, part.text)),
        );
        const below = h("span", { class: "piece-score" }, score(found));
        const exact = result.gates.map(
            (gate, index) => `${named(gate)} ${piece.scores[index] ?? "reads nothing here"}`,
        );
        const node = h("span", { class: "piece", title: [`token ${piece.token}`, ...exact].join("\n") }, text, below);
        if (found !== null && threshold !== null) {
            const distance = Math.max(-1, Math.min(1, (found - threshold) / full));
            node.classList.add(distance > 0 ? "above" : "below");
            node.style.setProperty("--weight", `${(Math.abs(distance) * 100).toFixed(0)}%`);
        } else if (found === null) {
            node.classList.add("unread");
        }
        return piece.text.includes("\n") ? [node, h("span", { class: "break" })] : [node];
    };

    const colour = () => {
        const chosen = Number(at("gate").value || 0);
        const gate = result.gates[chosen];
        const scores = result.pieces.map((piece) => piece.scores[chosen] ?? null);
        const threshold = gate ? guards.threshold(gate.guard, gate.gate) : null;
        const full = fullColour(scores, threshold ?? 0);
        at("scale").hidden = threshold === null;
        say(at("low"), `${score(threshold - full)} or less`);
        say(at("middle"), `threshold ${score(threshold)}`);
        say(at("high"), `${score(threshold + full)} or more`);
        at("pieces").replaceChildren(...result.pieces.flatMap((piece) => pieceOf(piece, chosen, threshold, full)));
    };

    const tabulate = () => {
        const heads = ["Token", "Text", ...result.gates.map(named)].map((head) => h("th", { scope: "col" }, head));
        const scores = (piece) => result.gates.map((_, index) => number(String(piece.scores[index] ?? "–")));
        const rows = result.pieces.map((piece) =>
            row(number(String(piece.token)), h("td", {}, h("code", {}, JSON.stringify(piece.text))), ...scores(piece)),
        );
        at("piece-table").replaceChildren(h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...rows));
    };

    at("gate").addEventListener("change", colour);
    at("piece-details").addEventListener("toggle", () => at("piece-details").open && tabulate());

    return (found) => {
        result = { ...found, pieces: found.pieces ?? [] };
        const { gates, tokens, flagged } = result;
        const fired = gates.filter((gate) => gate.fired).map(named);
        const none = gates.length ? "No gate fired." : "No gate is in force.";
        const words = flagged ? `Fired: ${fired.join(", ")}.` : none;
        say(at("verdict"), `${tokens} tokens with the model's chat template. ${words}`);
        const verdict = (gate) =>
            h(
                "td",
                {},
                h("span", { class: `pill ${gate.fired ? "problem" : "ok"}` }, gate.fired ? "fired" : "did not fire"),
            );
        at("gate-scores").replaceChildren(
            ...gates.map((gate) =>
                row(
                    named(gate),
                    number(score(gate.score)),
                    number(score(guards.threshold(gate.guard, gate.gate))),
                    verdict(gate),
                ),
            ),
        );
        at("gate").replaceChildren(...gates.map((gate, index) => h("option", { value: index }, named(gate))));
        at("gate").value = Math.max(
            0,
            gates.findIndex((gate) => gate.fired),
        );
        at("scores").hidden = false;
        colour();
        if (at("piece-details").open) tabulate();
    };
}

const FINISHES = {
    stop: "ended by itself",
    length: "no more tokens were asked for",
    content_filter: "a guard blocked it",
};

/** One of two answers side by side. */
function answerSide(id) {
    const [text, error, report] = [".text", ".error", ".report"].map((part) => at(id).querySelector(part));
    const side = { answer: emptyAnswer(), error };

    side.show = (mark) => {
        const { pieces, done } = side.answer;
        const before = pieces.slice(0, mark ?? pieces.length).join("");
        const parts = [before];
        if (mark !== null && mark < pieces.length)
            parts.push(
                h("mark", { title: "the first token that differs" }, pieces[mark]),
                pieces.slice(mark + 1).join(""),
            );
        else if (mark !== null && pieces.length && done) parts.push(h("mark", { class: "end" }, "ends here"));
        text.replaceChildren(...parts);
    };
    side.report = (seconds) => {
        const { finish, gates, blockedBy, refusal, guard, usage } = side.answer;
        const facts = [["Finish", `${finish}${FINISHES[finish] ? `: ${FINISHES[finish]}` : ""}`]];
        if (blockedBy) facts.push(["Blocked by", `${blockedBy.guard}/${blockedBy.gate}`]);
        if (usage) facts.push(["Tokens", `${usage.completion_tokens} in ${duration(seconds)}`]);
        facts.push(
            ["Acted", guard?.acted?.length ? guard.acted.join(", ") : "no guard"],
            ["Epoch", String(guard?.epoch ?? "–")],
        );
        const readings = gates.map(({ guard, gate, score: found, fired }) =>
            row(`${guard}/${gate}`, number(score(found)), fired ? "fired" : "did not fire"),
        );
        report.replaceChildren(
            ...(refusal ? [h("p", { class: "refusal" }, refusal)] : []),
            h(
                "dl",
                { class: "facts" },
                ...facts.map(([term, words]) => h("div", {}, h("dt", {}, term), h("dd", {}, words))),
            ),
            ...(readings.length
                ? [h("table", { "aria-label": "Gates" }, h("tbody", {}, ...readings))]
                : [h("p", { class: "note" }, "No gate read it.")]),
        );
    };
    side.begin = () => {
        side.answer = emptyAnswer();
        say(error, "");
        report.replaceChildren();
        text.replaceChildren();
        text.setAttribute("aria-busy", "true");
    };
    side.end = () => text.setAttribute("aria-busy", "false");
    return side;
}

/** Reads a chat's stream to its end, and hands each chunk on. */
async function streamed(body, signal, onChunk) {
    const response = await reach("/v1/chat/completions", { method: "POST", body, signal });
    if (!response.ok) throw await refusal(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const events = eventReader();
    for (;;) {
        const { done, value } = await reader.read().catch((error) => Promise.reject(lost(error)));
        if (done) throw new Lost("the answer broke off");
        for (const data of events(value)) {
            if (data === "[DONE]") return;
            const chunk = JSON.parse(data);
            if (chunk.error) throw new Refused(response.status, chunk.error.message);
            onChunk(chunk);
        }
    }
}

function startPlayground(guards) {
    const board = scoreBoard(guards);
    const [guarded, unguarded] = [answerSide("guarded"), answerSide("unguarded")];
    const messages = () => [{ role: "user", content: at("prompt").value }];
    const words = (error) => (error.name === "AbortError" ? "Stopped." : `Not answered: ${error.message}`);

    const read = async (signal) => {
        const body = { messages: messages(), per_token: true };
        const { results } = await json("/v1/guard/score", { method: "POST", body, signal });
        board(results[0]);
    };

    const showBoth = () => {
        const [one, other] = firstDifference(guarded.answer, unguarded.answer) ?? [null, null];
        guarded.show(one);
        unguarded.show(other);
        const piece = ({ answer }, index) =>
            index < answer.pieces.length ? JSON.stringify(answer.pieces[index]) : "nothing more";
        const text = ({ answer }) => (answer.done ? answer.pieces.join("") : null);
        const areSame = text(guarded) !== null && text(guarded) === text(unguarded);
        if (one !== null) {
            const words = `as it is ${piece(guarded, one)}, with all guards off ${piece(unguarded, other)}`;
            say(at("difference"), `The texts part at token ${Math.min(one, other) + 1}: ${words}.`);
        } else {
            say(at("difference"), areSame ? "The two texts are the same." : "");
        }
    };

    const answer = async (side, more, signal) => {
        const began = performance.now();
        side.begin();
        showBoth();
        const body = {
            messages: messages(),
            max_tokens: at("max-tokens").valueAsNumber,
            temperature: at("temperature").valueAsNumber,
            seed: at("seed").valueAsNumber,
            stream: true,
            stream_options: { include_usage: true },
            ...more,
        };
        try {
            await streamed(body, signal, (chunk) => {
                side.answer = withChunk(side.answer, chunk);
                showBoth();
            });
            side.report((performance.now() - began) / 1000);
        } catch (error) {
            say(side.error, words(error));
        } finally {
            side.end();
        }
    };

    const compare = async (signal) => {
        at("answers").hidden = false;
        await Promise.all([answer(guarded, {}, signal), answer(unguarded, { guard: { disable: true } }, signal)]);
    };

    let stop = null;
    let prompt = "";
    at("ask").addEventListener("submit", async (event) => {
        event.preventDefault();
        if (stop) return;
        stop = new AbortController();
        // What is shown is of this prompt alone.
        if (at("prompt").value !== prompt) {
            at("scores").hidden = true;
            at("answers").hidden = true;
            say(at("difference"), "");
        }
        prompt = at("prompt").value;
        const buttons = [at("score"), at("compare")];
        buttons.forEach((button) => (button.disabled = true));
        at("stop").hidden = false;
        say(at("ask-error"), "");
        try {
            await (event.submitter?.value === "score" ? read : compare)(stop.signal);
        } catch (error) {
            say(at("ask-error"), words(error));
        } finally {
            stop = null;
            buttons.forEach((button) => (button.disabled = false));
            at("stop").hidden = true;
        }
    });
    at("stop").addEventListener("click", () => stop?.abort());
}

/** The field of the key, and what the server makes of it. */
function startKey(onNewKey) {
    const [field, forget, access] = [at("key"), at("forget"), at("access")];
    const tell = (kind, words) => {
        access.className = kind;
        say(access, words);
    };
    const use = (key) => {
        if (key) sessionStorage.setItem(KEY, key);
        else sessionStorage.removeItem(KEY);
        forget.hidden = !key;
        tell("", "");
        onNewKey();
    };
    field.value = brought() ?? "";
    forget.hidden = !brought();
    at("key-form").addEventListener("submit", (event) => {
        event.preventDefault();
        use(field.value.trim());
    });
    forget.addEventListener("click", () => {
        field.value = "";
        use("");
        field.focus();
    });
    let isAdmin = true;
    return {
        isTaken: () => isAdmin && tell("ok", brought() ? "The server knows this key." : "This server asks for no key."),
        isUnknown: () =>
            tell("problem", brought() ? "The server does not know this key." : "This server asks for a key."),
        mayNotChange: () => {
            isAdmin = false;
            tell("problem", "This key is no admin's: it may look at guards, and not change them.");
        },
        isNew: () => (isAdmin = true),
    };
}

function start() {
    let isUnknown = false;
    const key = startKey(() => {
        isUnknown = false;
        key.isNew();
        guards.clear("");
        readKeyed();
    });
    const guards = guardList(key.mayNotChange);
    const shut = () => {
        const words = brought()
            ? "The server does not know the key."
            : "The server shows this to whoever has a key: give one above.";
        isUnknown = true;
        key.isUnknown();
        guards.clear(words);
        say(at("history-note"), words);
        show(at("history-rows"), null, () => []);
    };
    const heard = connection(() => (isUnknown = false));
    const readMetrics = metricsReader();
    const readAll = async () => {
        const asked = brought();
        try {
            await guards.read();
            if (brought() !== asked) return;
            key.isTaken();
            await readHistory();
        } catch (error) {
            if (!(error instanceof Refused)) throw error;
            if (brought() !== asked) return;
            if (error.status === 401) shut();
            else say(at("guards-note"), error.message);
        }
    };
    poll(2000, () => heard(readHealth));
    poll(1000, () => heard(readMetrics));
    // A key that was refused is refused the next time too.
    const readKeyed = poll(2000, async () => isUnknown || (await heard(readAll)));
    startPlayground(guards);
}

if (typeof document !== "undefined") start();
