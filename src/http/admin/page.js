/**
 * The page of ADMIN_PORT. Every two seconds it asks for /metrics, /health and /sessions, and for the session that is
 * shown; charts are what /metrics said, kept for five minutes. Ids are clients' and backends' own text: they are only
 * ever set as text.
 */

const everyMs = 2000;
const keptMs = 300_000;
/** Charts are at least so wide. */
const leastSpanMs = 30_000;
/** Rates and percentiles are over this long. */
const windowMs = 10_000;

const $ = (id) => document.getElementById(id);

/** The metrics at one moment. */
class Scrape {
  /** Of each name: [labels, value]. */
  #series = new Map();
  constructor(text) {
    this.atMs = performance.now();
    for (const [, name, labels = "", value] of text.matchAll(/^(\w+)(?:\{(.*)\})? (\S+)$/gm)) {
      if (!this.#series.has(name)) this.#series.set(name, []);
      const pairs = [...labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, label, text]) => [label, text]);
      this.#series.get(name).push([Object.fromEntries(pairs), Number(value)]);
    }
  }
  all(name) {
    return this.#series.get(name) ?? [];
  }
  /** The sum of a name's series, or of those that have a label's value. */
  sum(name, label, wanted) {
    return this.all(name).reduce((sum, [labels, value]) => labels[label] === wanted ? sum + value : sum, 0);
  }
  /** A histogram's counts by upper bound, as they are exposed: each with all below it. */
  buckets(name) {
    const counts = new Map();
    for (const [{ le }, value] of this.all(`${name}_bucket`)) counts.set(le, (counts.get(le) ?? 0) + value);
    return counts;
  }
}

/** What a counter grew by a second; undefined when that cannot be told, as after a restart. */
function rate(now, then, ...series) {
  const grown = now.sum(...series) - then.sum(...series);
  return grown < 0 || now === then ? undefined : grown / (now.atMs - then.atMs) * 1000;
}

/** A percentile of what was measured between two scrapes, in seconds, as Prometheus' histogram_quantile estimates it. */
function quantile(now, then, name, q) {
  const before = then.buckets(name);
  const grown = [...now.buckets(name)].map((
    [le, count],
  ) => [Number(le.replace("+Inf", "Infinity")), count - (before.get(le) ?? 0)])
    .sort(([a], [b]) => a - b);
  const total = grown.at(-1)?.[1] ?? 0;
  if (total <= 0) return undefined;
  let [lower, below] = [0, 0];
  for (const [upper, count] of grown) {
    if (count >= q * total) {
      return upper === Infinity ? lower : lower + (upper - lower) * (q * total - below) / (count - below || 1);
    }
    [lower, below] = [upper, count];
  }
  return lower;
}

const scaled = (value, units, step) => {
  let at = 0;
  while (value >= step && at < units.length - 1) [value, at] = [value / step, at + 1];
  return `${value >= 10 ? Math.round(value) : Number(value.toPrecision(2))} ${units[at]}`.trim();
};
const asCount = (value) => {
  if (value < 10) return String(Math.round(value * 10) / 10);
  return value < 10_000 ? String(Math.round(value)) : scaled(value / 1000, ["k", "M", "G"], 1000);
};
const asBytes = (value) => scaled(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
const asSeconds = (value) => scaled(value * 1e6, ["µs", "ms", "s"], 1000);
const asAge = (ms) => {
  const secs = Math.max(0, Math.round(ms / 1000));
  if (secs < 120) return `${secs} s`;
  if (secs < 7200) return `${Math.floor(secs / 60)} min`;
  return secs < 172_800 ? `${Math.floor(secs / 3600)} h` : `${Math.floor(secs / 86_400)} days`;
};

const down = "wsproxy_down_latency_seconds";
const up = "wsproxy_up_latency_seconds";
const loop = "wsproxy_event_loop_lag_seconds";
const trip = "wsproxy_redis_round_trip_seconds";

/** Each chart's lines: what of two scrapes they show. */
const charts = [
  {
    title: "Connections",
    format: asCount,
    lines: [["open", (now) => now.sum("wsproxy_connections")]],
  },
  {
    title: "Messages a second",
    format: asCount,
    lines: [
      ["down", (now, then) => rate(now, then, "wsproxy_messages_down_total")],
      ["up", (now, then) => rate(now, then, "wsproxy_messages_up_total")],
    ],
  },
  ...[["Latency down", down], ["Latency up", up], ["Redis round trip", trip], ["Event loop lag", loop]].map((
    [title, name],
  ) => ({
    title,
    format: asSeconds,
    lines: [
      ["p50", (now, then) => quantile(now, then, name, 0.5)],
      ["p99", (now, then) => quantile(now, then, name, 0.99)],
    ],
  })),
  {
    title: "Waiting",
    format: asBytes,
    lines: [
      ["for clients", (now) => now.sum("wsproxy_buffered_bytes")],
      ["for Redis", (now) => now.sum("wsproxy_pending_bytes")],
    ],
  },
  {
    title: "Workers and Redis",
    format: asCount,
    lines: [
      ["workers", (now) => now.sum("wsproxy_workers")],
      ["Redis", (now) => now.sum("wsproxy_redis_up")],
    ],
  },
  {
    title: "Handshakes a second",
    format: asCount,
    lines: [
      ["admitted", (now, then) => rate(now, then, "wsproxy_handshake_seconds_count", "outcome", "admitted")],
      ["refused", (now, then) => rate(now, then, "wsproxy_handshake_seconds_count", "outcome", "refused")],
    ],
  },
];

function element(tag, { className, text } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

const svg = (tag, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

const classes = ["one", "two"];

function createChart({ title, format, lines }) {
  const values = lines.map(() => []);
  const now = lines.map((_, at) => element("span", { className: `now ${classes[at]}` }));
  const drawing = svg("svg", { viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img" });
  const polylines = lines.map((_, at) => svg("polyline", { class: classes[at] }));
  drawing.append(...polylines);
  const top = element("span");
  const span = element("span");
  $("charts").append(element(
    "figure",
    {},
    element("figcaption", {}, element("h2", { text: title }), ...now),
    drawing,
    element("div", { className: "scale" }, top, span),
  ));
  return (atMs, sample) => {
    for (const [at, value] of sample.entries()) {
      values[at].push([atMs, value]);
      while (atMs - values[at][0][0] > keptMs) values[at].shift();
      now[at].textContent = `${lines[at][0]} ${value === undefined ? "–" : format(value)}`;
    }
    const max = Math.max(0, ...values.flat().map(([, value]) => value ?? 0));
    top.textContent = `max ${format(max)}`;
    const spanMs = Math.max(leastSpanMs, atMs - values[0][0][0]);
    span.textContent = asAge(spanMs);
    for (const [at, polyline] of polylines.entries()) {
      const points = values[at].filter(([, value]) => value !== undefined)
        .map(([ms, value]) => `${300 - (atMs - ms) / spanMs * 300},${59 - (max > 0 ? value / max : 0) * 57}`);
      polyline.setAttribute("points", points.join(" "));
    }
    drawing.setAttribute("aria-label", `${title}: ${now.map(({ textContent }) => textContent).join(", ")}`);
  };
}

const drawn = charts.map((chart) => ({ ...chart, draw: createChart(chart) }));
const scrapes = [];

function showMetrics(scrape) {
  scrapes.push(scrape);
  while (scrape.atMs - scrapes[0].atMs > keptMs) scrapes.shift();
  const then = scrapes.findLast(({ atMs }) => scrape.atMs - atMs >= windowMs) ?? scrapes[0];
  for (const { lines, draw } of drawn) draw(scrape.atMs, lines.map(([, of]) => of(scrape, then)));
  const [build] = scrape.all("wsproxy_build_info")[0] ?? [{}];
  const workers = scrape.sum("wsproxy_workers");
  $("build").textContent = `${build.version} on Deno ${build.deno}, engine ${build.engine}, ` +
    `${workers} ${workers === 1 ? "worker" : "workers"}, ${asBytes(scrape.sum("wsproxy_resident_memory_bytes"))}`;
  const before = new Map(scrapes[0].all("wsproxy_closed_total").map(([{ code }, value]) => [code, value]));
  // The page knows of nothing that was before it.
  $("closes-title").textContent = `Closes of the last ${asAge(scrape.atMs - scrapes[0].atMs)}, by code`;
  const closes = scrape.all("wsproxy_closed_total")
    .map(([{ code }, value]) => [code, value - (before.get(code) ?? 0)]).filter(([, grown]) => grown > 0)
    .sort(([, a], [, b]) => b - a);
  $("closes").replaceChildren(...closes.map(([code, grown]) => {
    const bar = element("meter");
    bar.max = closes[0][1];
    bar.value = grown;
    bar.ariaHidden = "true";
    return element("li", { text: `${code}: ${grown}` }, bar);
  }));
  if (closes.length === 0) $("closes").append(element("li", { text: "none" }));
}

function showHealth(health) {
  const { status, error, shards } = health;
  const failing = Object.entries(shards ?? {}).filter(([, state]) => state !== "connected");
  const more = error ?? failing.map(([name, state]) => `${name}: ${state}`).join("; ");
  say($("health"), more ? `${status}: ${more}` : status, status === "healthy" ? "good" : "bad");
}

/** Sets a text only when it changes, so that a screen reader says it once. */
function say(where, text, className) {
  if (where.textContent !== text) where.textContent = text;
  if (className !== undefined) where.className = className;
}

/** Of a long id both ends: ids of one kind often begin alike. */
const mostShown = 28;
function shorten(id) {
  const chars = [...id];
  if (chars.length <= mostShown) return id;
  return `${chars.slice(0, mostShown / 2 - 1).join("")}…${chars.slice(-mostShown / 2).join("")}`;
}

/** An id, with all of it for the pointer. */
function shownId(tag, id) {
  const made = element(tag, { text: shorten(id) });
  made.title = id;
  return made;
}

/** A row of a table's body. On a narrow screen each value stands beside its column's name. */
function row(body, ...cells) {
  const names = [...body.closest("table").querySelectorAll("th")].map(({ textContent }) => textContent);
  return element(
    "tr",
    {},
    ...cells.map((cell, at) => {
      const made = element("td", {}, cell);
      made.dataset.name = names[at];
      return made;
    }),
  );
}

function showSessions({ now_ms, sessions }) {
  const focused = document.activeElement?.dataset.session;
  const rows = sessions.map((one) => {
    const button = shownId("button", one.session);
    button.type = "button";
    button.dataset.session = one.session;
    return row(
      $("sessions"),
      button,
      shownId("span", one.agent),
      String(one.sockets),
      `${asBytes(one.per_sec)}/s`,
      asBytes(one.down_bytes),
      asBytes(one.up_chars),
      asBytes(one.unsent_bytes),
      asAge(now_ms - one.opened_ms),
    );
  });
  $("sessions").replaceChildren(...rows);
  $("none").hidden = rows.length > 0;
  if (focused !== undefined) focusSession(focused);
}

function focusSession(session) {
  [...$("sessions").querySelectorAll("button")].find(({ dataset }) => dataset.session === session)?.focus();
}

/** The session that is shown, and whether it has been ended from here: its sockets may take a while to go. */
let shown;
let ended = false;

function showSockets({ now_ms, sockets }) {
  $("sockets").replaceChildren(...sockets.map((one) =>
    row(
      $("sockets"),
      one.connection,
      shownId("span", one.agent),
      asAge(now_ms - one.opened_ms),
      asAge(one.quiet_ms),
      one.expires_ms === null ? "never" : asAge(one.expires_ms - now_ms),
      one.position ?? "–",
      asBytes(one.down_bytes),
      asBytes(one.up_chars),
      asBytes(one.unsent_bytes),
    )
  ));
}

const pathOf = (session) => `sessions/${encodeURIComponent(session)}`;

async function ask(path, options) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(5000), ...options });
  if (path !== "health" && !answer.ok) throw new Error((await answer.text()).trim());
  return path === "metrics" ? new Scrape(await answer.text()) : await answer.json();
}

/** Shows a session, if it has a socket. @throws when it has none. */
async function open(session) {
  const detail = await ask(pathOf(session));
  shown = session;
  $("detail-title").textContent = `Session ${session}`;
  $("detail-note").textContent = "";
  confirming(false);
  ended = false;
  $("end").hidden = false;
  showSockets(detail);
  if (!$("detail").open) $("detail").showModal();
  $("close").focus();
}

function confirming(yes) {
  $("ask").hidden = yes;
  $("confirm").hidden = !yes;
}

async function refreshDetail() {
  if (shown === undefined) return;
  const session = shown;
  try {
    const detail = await ask(pathOf(session));
    if (shown !== session) return;
    showSockets(detail);
    $("end").hidden = ended;
  } catch (error) {
    if (shown !== session) return;
    $("sockets").replaceChildren();
    if ($("detail-note").textContent === "") say($("detail-note"), error.message);
    // One that comes back can be ended again.
    ended = false;
    $("end").hidden = true;
  }
}

async function end() {
  confirming(false);
  $("close").focus();
  try {
    const { sockets } = await ask(pathOf(shown), { method: "DELETE" });
    ended = true;
    $("end").hidden = true;
    say($("detail-note"), `Ended: ${sockets} ${sockets === 1 ? "socket" : "sockets"}.`);
  } catch (error) {
    say($("detail-note"), `Not ended: ${error.message}`);
  }
  await refreshDetail();
}

let paused = false;

async function refresh() {
  const asked = [["metrics", showMetrics], ["health", showHealth], ["sessions", showSessions]];
  try {
    await Promise.all([
      ...asked.map(async ([path, show]) => {
        const answer = await ask(path);
        if (!paused) show(answer);
      }),
      refreshDetail(),
    ]);
  } catch (error) {
    say($("health"), `no answer: ${error.message}`, "bad");
  }
}

async function watch() {
  while (true) {
    if (!paused && !document.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, everyMs));
  }
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
});
$("sessions").addEventListener("click", ({ target }) => {
  const session = target.closest("button")?.dataset.session;
  if (session !== undefined) open(session).catch((error) => say($("found"), error.message));
});
$("find").addEventListener("submit", async (event) => {
  event.preventDefault();
  say($("found"), "");
  await open($("find-id").value).catch((error) => say($("found"), error.message));
});
$("detail").addEventListener("close", () => {
  // Its button is a new one by now.
  focusSession(shown);
  shown = undefined;
});
$("close").addEventListener("click", () => $("detail").close());
$("end").addEventListener("click", () => {
  confirming(true);
  $("cancel").focus();
});
$("cancel").addEventListener("click", () => {
  confirming(false);
  $("end").focus();
});
$("end-now").addEventListener("click", end);

watch();
