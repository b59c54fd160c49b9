// The page of /_proxy/. Takes events from /_proxy/events and writes them down; whatever came from outside goes in as
// text, never as markup.
"use strict";

const KEPT = 100, STEPS = 360, STEP = 10;
const narrow = matchMedia("(max-width: 58rem)");
const first = () => (narrow.matches ? 8 : 20);  // rows of a long table that are shown, unless all are wanted
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

let now = null;            // what is so
let skew = 0;              // the proxy's clock less ours, seconds
let step = 0;              // the number of the proxy's present step
let stepped = 0;           // when we heard of it, milliseconds
const hour = new Map();    // step -> [requests, saved, refusals, errors, faults, wait]
const whole = new Set();    // tables of which all rows are wanted
let exchanges = [];        // the latest first
// What is not told of an exchange.
const NOTHING = { id: "", route: "", caller: "", status: 0, code: "", kind: "", queued: 0, upstream: 0, attempts: 0, refusals: 0, left: false };

// --- In words -------------------------------------------------------------------------------------------------------

function seconds(value) {
  if (value < 0.0005) return "0 s";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  if (value < 129600) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} d`;
}

function exact(value) {
  return value >= 90 ? seconds(value) : `${Number(value.toFixed(3))} s`;
}

function bytes(value) {
  if (value < 1024) return `${value} B`;
  if (value < 1048576) return `${(value / 1024).toFixed(1)} KiB`;
  return `${(value / 1048576).toFixed(1)} MiB`;
}

const count = (value) => value.toLocaleString("en");
const share = (part, all) => (all ? `${((100 * part) / all).toFixed(part && part < all ? 1 : 0)} %` : "–");
const many = (value, one) => `${count(value)} ${value === 1 ? one : `${one}s`}`;

function until(when) {
  if (when === null) return "under way";
  const left = when - present();
  return left <= 0.05 ? "now" : seconds(left < 1 ? Math.ceil(left * 10) / 10 : left);
}

const present = () => Date.now() / 1000 + skew;
const ago = (when) => Math.max(0, present() - when);
const key = (credential) => (credential === "*" ? "all keys" : credential);

// Callers with the most requests in a line; how urgent those are, where it is not as usual (RFC 9218).
function who(line) {
  const told = line.callers.map((one) => `${one.caller} ${count(one.waiting)}${one.urgency === 3 ? "" : ` (u=${one.urgency})`}`);
  const rest = line.waiting - line.callers.reduce((sum, one) => sum + one.waiting, 0);
  return told.join(", ") + (rest > 0 ? `, others ${count(rest)}` : "");
}

const clock = (wall) => new Date(wall * 1000).toLocaleTimeString("en-GB");

// --- Down on the page -----------------------------------------------------------------------------------------------

function say(node, text, kind = "") {
  if (node.textContent !== text) node.textContent = text;
  if (node.dataset.kind !== kind) {
    if (node.dataset.kind) node.classList.remove(node.dataset.kind);
    if (kind) node.classList.add(kind);
    node.dataset.kind = kind;
  }
}

// Rows of cells, each [text, class, kind]; what is there is changed, so that a selection and the focus stay.
// `cut`: there are more than have been told of.
function fill(id, all, cut = false) {
  const table = at(id), body = table.tBodies[0], more = table.parentElement.querySelector(".more");
  const rows = more && !whole.has(id) ? all.slice(0, first()) : all;
  if (more) {
    const rest = cut ? "; there are more: /_proxy/status?all" : "";
    more.hidden = all.length <= first() && !cut;
    more.dataset.of = id;
    say(more, (whole.has(id) ? `Only the first ${first()}` : `All ${count(all.length)}`) + rest);
  }
  const heads = table.tHead ? [...table.tHead.rows[0].cells].map((cell) => cell.textContent) : [];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, y) => {
    const row = body.rows[y] || body.insertRow();
    cells.forEach(([text, style = "", kind = ""], x) => {
      let cell = row.cells[x];
      if (!cell) {
        cell = row.insertCell();
        if (style) cell.className = style;
        if (heads[x]) cell.dataset.label = heads[x];
      }
      say(cell, String(text), kind);
    });
  });
  table.hidden = !rows.length;
  const none = table.nextElementSibling;
  if (none && none.classList.contains("none")) none.hidden = rows.length > 0;
}

const PLOTS = [
  { name: "Requests", of: (slot) => slot[0], sum: true, told: count },
  { name: "Calls saved", of: (slot) => slot[1], sum: true, told: count },
  { name: "Longest wait", of: (slot) => slot[5], sum: false, told: seconds },
  { name: "429s absorbed", of: (slot) => slot[2], sum: true, told: count, warn: true },
];

function make(tag, parent, text = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  parent.append(node);
  return node;
}

for (const plot of PLOTS) {
  const figure = make("figure", at("plots"));
  const caption = make("figcaption", figure);
  make("b", caption, plot.name);
  plot.total = make("span", caption);
  plot.svg = document.createElementNS(SVG, "svg");
  plot.svg.setAttribute("viewBox", `0 0 ${STEPS} 60`);
  plot.svg.setAttribute("preserveAspectRatio", "none");
  plot.svg.setAttribute("role", "img");
  if (plot.warn) plot.svg.classList.add("warn");
  plot.path = document.createElementNS(SVG, "path");
  plot.svg.append(plot.path);
  figure.append(plot.svg);
  const axis = make("div", figure);
  axis.className = "axis";
  make("span", axis, "1 h ago");
  plot.most = make("span", axis);
  make("span", axis, "now");
}

const oldest = () => now.lines.reduce((most, line) => Math.max(most, ago(line.oldest_at)), 0);

function inTheHour(which) {
  let sum = 0;
  for (const [number, slot] of hour) if (number > step - STEPS) sum += slot[which];
  return sum;
}

function draw() {
  if (now.lines.length) {  // who still waits
    const slot = hour.get(step) || [0, 0, 0, 0, 0, 0];
    slot[5] = Math.max(slot[5], oldest());
    hour.set(step, slot);
  }
  for (const plot of PLOTS) {
    let most = 0, all = 0;
    const values = [];
    for (let number = step - STEPS + 1; number <= step; number += 1) {
      const slot = hour.get(number);
      const value = slot ? plot.of(slot) : 0;
      values.push(value);
      most = Math.max(most, value);
      all += value;
    }
    // Two steps wide where there is something: a lone bar of one would hardly be seen.
    const bars = values.map((value, x) => {
      if (!value) return "";
      const height = Math.max(2, (value / most) * 54), wide = Math.min(2, STEPS - x);
      return `M${x} 60V${(60 - height).toFixed(1)}h${wide}V60z`;
    });
    plot.path.setAttribute("d", bars.join(""));
    const told = plot.sum ? `${plot.told(all)} in the last hour` : most ? `${plot.told(most)} at the most` : "none";
    say(plot.total, plot.sum ? plot.told(all) : plot.told(most));
    say(plot.most, plot.sum && most ? `peak ${plot.told(most)} in ${STEP} s` : "");
    plot.svg.setAttribute("aria-label", `${plot.name}: ${told}`);
  }
}

const STATUS = {
  "2": (one) => one.status >= 200 && one.status < 300,
  "4": (one) => one.status >= 400 && one.status < 500,
  "5": (one) => one.status >= 500,
  "code": (one) => one.code !== "",
  "fault": (one) => one.kind === "fault" || (one.status >= 500 && !one.code),
  "429": (one) => one.refusals > 0 || one.status === 429,
  "left": (one) => one.left,
};

function chosen() {
  const text = at("filter-text").value.trim().toLowerCase();
  const status = STATUS[at("filter-status").value], cache = at("filter-cache").value;
  return exchanges.filter((one) =>
    (!text || `${one.method} ${one.route} ${one.caller} ${one.id} ${one.code}`.toLowerCase().includes(text))
    && (!status || status(one)) && (!cache || one.cache === cache));
}

function showExchanges() {
  const some = chosen();
  say(at("filter-count"), exchanges.length ? `${some.length} of ${exchanges.length}` : "");
  fill("exchanges", some.map((one) => [
    [clock(one.at), "time"],
    [`${one.method} ${one.route || "–"}`, "route"],
    [one.caller || "–", "key"],
    [one.left ? "left" : one.code ? `${one.status} ${one.code}` : one.status, "n",
      STATUS.fault(one) ? "bad" : one.kind === "client" ? "" : one.status >= 400 || one.code || one.left ? "warn" : ""],
    [one.cache, "cache", one.cache === "hit" || one.cache === "collapsed" ? "good" : one.cache === "stale" ? "warn" : ""],
    [one.queued >= 0.001 ? seconds(one.queued) : "", "n"],
    [one.upstream >= 0.001 ? seconds(one.upstream) : "", "n"],
    [one.attempts ? one.refusals ? `${one.attempts}, ${one.refusals} refused` : one.attempts : "", "n", one.refusals ? "warn" : ""],
    [one.id, "id"],
  ]));
}

function showTimed() {
  fill("lines", now.lines.map((line) => [
    [line.route, "route"], [key(line.credential), "key"], [count(line.waiting), "n"],
    [seconds(Math.round(ago(line.oldest_at))), "n"], [line.held_by, "held"],
    [who(line), "who"], [until(line.due_at), "n"], [until(line.newcomer_at), "n"],
  ]), now.cut.includes("lines"));
  fill("limits", now.limits.map((limit) => [
    [limit.route === "account" ? `the whole account${limit.upstream === "api" ? "" : ` (${limit.upstream})`}` : limit.route, "route"],
    [key(limit.credential), "key"],
    [limit.interval ? exact(limit.interval) : "no limit", "n"],
    [limit.interval ? count(limit.capacity) : "", "n"],
    [limit.interval ? limit.source : "", "", limit.source === "learned" ? "warn" : ""],
    [limit.interval ? until(limit.due_at) : "", "n"],
    [count(limit.sends), "n"],
    [limit.correction, "note"],
  ]), now.cut.includes("limits"));
  say(at("about"), `${now.version} · up ${seconds(Math.max(1, ago(now.started)))} · for ${now.upstreams.api}`);
  say(at("sum-waiting-more"),
    now.waiting ? `in ${many(now.line_count, "line")}, oldest ${seconds(Math.round(oldest()))}` : "");
  say(at("ceiling"), Object.entries(now.origins)
    .filter(([name, origin]) => name === "api" || origin.waiting || origin.in_flight).map(ceiling).join(" · "));
}

// What all calls to an upstream share; how many may go at once just now follows from when all may again.
function ceiling([name, origin]) {
  const flying = `${count(origin.in_flight)} of ${many(origin.slots, "connection")} in use`;
  const whose = name === "api" ? "All calls to the API" : `To ${name}`;
  if (!origin.rate) return `${whose}: no ceiling, ${flying}`;
  const left = origin.burst - Math.max(0, origin.full_at - present()) * origin.rate;
  return `${whose}: ${Number(origin.rate.toFixed(2))} a second, up to ${origin.burst} at once (now ${Math.max(0, left).toFixed(1)}), ${flying}`;
}

// Whose matter an error is, and its colour.
const WHOSE = { fault: ["something failed", "bad"], room: ["no room, or no time", "warn"], client: ["the client's own", ""] };

function show() {
  const { totals, cache } = now;
  const errors = Object.values(totals.our_errors).reduce((sum, value) => sum + value, 0);
  const lately = inTheHour(3), faults = inTheHour(4);
  say(at("sum-waiting"), count(now.waiting), now.waiting ? "warn" : "");
  say(at("sum-flying"), count(now.in_flight));
  say(at("sum-flying-more"), `${count(totals.sent_upstream)} sent so far`);
  say(at("sum-requests"), count(totals.requests));
  say(at("sum-requests-more"), many(now.clients.connections, "connection"));
  say(at("sum-saved"), count(totals.calls_saved));
  say(at("sum-saved-more"), totals.requests ? `${share(totals.calls_saved, totals.requests)} of requests` : "");
  say(at("sum-refused"), count(totals.refused_upstream));
  say(at("sum-refused-more"), totals.refused_upstream ? `${share(totals.refused_upstream, totals.sent_upstream)} of calls` : "");
  say(at("sum-errors"), count(errors), faults ? "bad" : "");
  say(at("sum-errors-more"), errors ? `${count(lately)} in the last hour${faults ? `, ${many(faults, "fault")}` : ""}` : "");

  const away = Object.entries(now.away).filter(([, routes]) => routes.length)
    .map(([name, routes]) => `${name}: ${routes.includes("*") ? "everything" : routes.join(", ")}`
      + (now.pausing[name] ? `; ${many(now.pausing[name], "call")} waiting for it` : ""));
  say(at("away"), away.length ? `Counts as away, only probes are sent. ${away.join("; ")}` : "");
  at("away").hidden = !away.length;

  at("empty").hidden = totals.requests > 0 || now.waiting > 0;
  say(at("how"), `export VAST_URL=${location.origin}\nvastai search offers 'num_gpus=1'\n# and it appears here; no other setting is needed`);

  const by = totals.cache, hits = by.hit || 0, asked = hits + (by.miss || 0) + (by.collapsed || 0) + (by.stale || 0);
  fill("cache", [
    ["Hits", asked ? `${count(hits)}, ${share(hits, asked)} of what may be stored` : "0"],
    ["Shared a call", count(by.collapsed || 0)],
    ["Served stale", count(by.stale || 0)],
    ["Missed", count(by.miss || 0)],
    ["Stored", `${many(cache.entries, "answer")}, ${bytes(cache.bytes)} of ${bytes(cache.max_bytes)}`],
    ["Pushed out early", count(cache.evictions)],
  ].map(([name, value]) => [[name], [value, "n"]]));
  const rank = (code) => Object.keys(WHOSE).indexOf(totals.error_kinds[code]);
  fill("errors", Object.entries(totals.our_errors).sort((a, b) => rank(a[0]) - rank(b[0]) || b[1] - a[1])
    .map(([code, number]) => {
      const [whose, kind] = WHOSE[totals.error_kinds[code]];
      return [[code, "key", kind], [whose, "whose"], [count(number), "n"]];
    }));
  showTimed();
}

// --- Live -----------------------------------------------------------------------------------------------------------

// Of what is so, an event has the parts that have changed; lines and limits are a part each.
function put(parts, changed) {
  for (const [name, part] of Object.entries(changed)) {
    if (part === null) parts.delete(name);
    else parts.set(name, part);
  }
  const all = { lines: [], limits: [] };
  for (const [name, part] of parts) {
    const slash = name.indexOf("/");
    if (slash < 0) all[name] = part;
    else all[name.slice(0, slash)].push(part);
  }
  const interest = (limit) => (limit.waiting ? 0 : limit.source === "learned" || limit.correction ? 1 : 2);
  all.lines.sort((a, b) => a.oldest_at - b.oldest_at);
  all.limits.sort((a, b) => interest(a) - interest(b) || b.sends - a.sends);
  return all;
}

function take(fresh, news) {
  if (now && fresh.instance !== now.instance) {  // another process: what it tells begins anew
    exchanges = [];
    hour.clear();
  }
  now = fresh;
  skew = news.wall - Date.now() / 1000;
  step = news.step;
  stepped = Date.now();
  for (const [number, ...slot] of news.slots) hour.set(number, slot);
  for (const number of hour.keys()) if (number <= step - STEPS) hour.delete(number);
  const latest = exchanges.length ? exchanges[0].n : 0;
  const later = news.exchanges.filter((one) => one.n > latest).map((one) => ({ ...NOTHING, ...one }));
  exchanges = [...later.reverse(), ...exchanges].slice(0, KEPT);
  draw();
  show();
  showExchanges();
}

function link(state, text) {
  at("link").dataset.state = state;
  say(at("link"), text);
}

// An EventSource could not send the token, so the same stream is read by hand. The token is kept for this tab alone.
const TOKEN = "vast-proxy token";
const AGAIN = 2000, SILENT = 40000;  // milliseconds; the proxy says something every 15 seconds
let following = null;                // the one loop that may follow; a new one ends it

async function read(answer, heard) {
  const reader = answer.body.getReader(), decoder = new TextDecoder(), parts = new Map();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    const events = (text + decoder.decode(value, { stream: true })).split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      link("live", "live");
      const told = JSON.parse(event.slice(6));
      take(put(parts, told.now), told.news);
    }
  }
}

function wanted(error, msg) {
  const token = error === "admin_only" || error === "token_unknown";
  at("login").hidden = !token;
  document.querySelector("main").hidden = now === null;
  at("forget").hidden = true;
  say(at("login-error"), error === "token_unknown" ? msg : "");
  link("lost", token ? "waits for the token" : msg);
  if (token) at("token").focus();
}

// Until the stream ends. Milliseconds until it is to be tried again, or null: not by itself.
async function listen(over) {
  const token = sessionStorage.getItem(TOKEN);
  const cut = new AbortController(), end = () => cut.abort();
  over.addEventListener("abort", end);
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(end, SILENT);
  };
  heard();
  try {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const answer = await fetch("/_proxy/events", { headers, signal: cut.signal, cache: "no-store" });
    if (answer.status === 401 || answer.status === 403) {
      const { error, msg } = await answer.json();
      if (!over.aborted) wanted(error, msg);
      return null;
    }
    at("login").hidden = true;
    document.querySelector("main").hidden = false;
    at("forget").hidden = !token;
    if (!answer.ok) {
      link("lost", "too many pages are open, or the proxy is stopping; trying again");
      return 5 * AGAIN;
    }
    await read(answer, heard);
  } catch (error) {
    if (!(error instanceof TypeError) && error.name !== "AbortError") throw error;  // else it is not there, or was cut off
  } finally {
    clearTimeout(timer);
    over.removeEventListener("abort", end);
  }
  if (!over.aborted) link("lost", "no connection, trying again");
  return AGAIN;
}

async function follow() {
  if (following) following.abort();
  const mine = following = new AbortController();
  while (!mine.signal.aborted) {
    const pause = await listen(mine.signal);
    if (pause === null) return;
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, at("token").value.trim());
  at("token").value = "";
  link("wait", "connecting");
  follow();
});
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  location.reload();
});
follow();

for (const id of ["filter-text", "filter-status", "filter-cache"]) at(id).addEventListener("input", showExchanges);
at("filters").addEventListener("submit", (event) => event.preventDefault());
for (const more of document.querySelectorAll(".more")) more.addEventListener("click", () => {
  const id = more.dataset.of;
  if (!whole.delete(id)) whole.add(id);
  showTimed();
  showExchanges();
});
setInterval(() => { if (now) showTimed(); }, 500);
setInterval(() => {
  if (!now) return;
  const passed = Math.floor((Date.now() - stepped) / (STEP * 1000));
  step += passed;
  stepped += passed * STEP * 1000;
  draw();
}, STEP * 1000);
