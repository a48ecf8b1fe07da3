// The page of a run: pictures over a WebSocket, figures over server-sent events. No library.
"use strict";

const NONE = "not available";
const STAGES = ["capture", "fit", "network", "head", "restore", "output"];
const VIEW_NAMES = { overlay: "Overlay", original: "Original", mask: "Mask" };
const STATE_NAMES = {
  opening: "opening", live: "live", stalled: "stalled", reconnecting: "reconnecting", ended: "ended",
};
const SILENCE_MS = 4000; // without a sign of life for so long, the program counts as lost
const RETRY_MS = 1500;
const SMOOTH_S = 5; // seconds that a point of the first chart is the mean of

const el = (id) => document.getElementById(id);

const state = {
  page: null, // what does not change: /page.json
  stats: null, // the latest figures
  recordings: { running: [], finished: [], notes: {} },
  recordingsAt: 0,
  past: {}, // source -> [[second, masks, age], …]
  now: 0,
  view: "overlay",
  chosen: "",
  cards: new Map(), // source -> the elements of its card
  shares: {},
  problem: "", // what was wrong with the last wish
  busy: new Set(), // sources whose recording is being started or stopped
};

// --- small things

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function put(node, text) {
  // Nothing is written that is there already: a screen reader would read it again.
  if (node.textContent !== text) node.textContent = text;
}

function say(text) {
  put(el("said"), text);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 2 });

function fixed(value, digits) {
  return value === null || value === undefined ? NONE : value.toFixed(digits);
}

function ms(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

function duration(seconds) {
  const s = Math.max(Math.floor(seconds), 0);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function clock(seconds) {
  const s = Math.max(Math.floor(seconds), 0);
  const pad = (n) => String(n).padStart(2, "0");
  const short = `${pad(Math.floor(s / 60) % 60)}:${pad(s % 60)}`;
  return s < 3600 ? short : `${Math.floor(s / 3600)}:${short}`;
}

function bytes(size) {
  if (size < 1e6) return `${Math.ceil(size / 1e3)} kB`;
  return size < 1e9 ? `${(size / 1e6).toFixed(1)} MB` : `${(size / 1e9).toFixed(2)} GB`;
}

function path(...parts) {
  return "/" + parts.map(encodeURIComponent).join("/");
}

// --- building the page, once

function build() {
  const { names, views, legend } = state.page;
  const wanted = new URLSearchParams(location.hash.slice(1));
  state.chosen = names.includes(wanted.get("source")) ? wanted.get("source") : names[0];
  state.view = views.includes(wanted.get("view")) ? wanted.get("view") : views[0];

  choices(el("views"), views, VIEW_NAMES, "radio", "aria-checked", (view) => {
    state.view = view;
    chose();
  });
  const many = names.length > 1;
  if (many) {
    el("tabs").hidden = false;
    choices(el("tabs"), names, {}, "tab", "aria-selected", (name) => {
      state.chosen = name;
      chose();
    });
    [...el("tabs").children].forEach((tab, place) => {
      tab.setAttribute("aria-controls", `source-${place}`);
    });
  }
  const list = el("sources");
  el("main").classList.toggle("several", many);
  list.classList.toggle("many", names.length > 1 && names.length <= 4);
  list.classList.toggle("lots", names.length > 4);
  names.forEach((name, place) => list.append(card(name, place, many)));
  el("legend").replaceChildren(
    ...legend.map(([name, colour]) => {
      const item = make("li");
      item.dataset.name = name;
      const swatch = make("span", "colour");
      swatch.style.background = colour;
      item.append(swatch, make("span", "title", name.replaceAll("_", " ")), make("span", "share"));
      return item;
    }),
  );
  el("stages").replaceChildren(
    ...STAGES.map((stage, place) => {
      const row = make("tr");
      const head = make("td");
      const key = make("span", "key");
      const swatch = make("i", "swatch");
      swatch.classList.add(place ? `p${place - 1}` : "none");
      key.append(swatch, stage);
      head.append(key);
      row.append(head, make("td"), make("td"), make("td"));
      row.dataset.stage = stage;
      return row;
    }),
  );
  el("stack").replaceChildren(
    ...STAGES.slice(1).map((stage, place) => {
      const part = make("i", `p${place}`);
      part.dataset.stage = stage;
      return part;
    }),
  );
  put(el("foot"), `EdgeSeg ${state.page.version} · masks per second: finished at the size of the `
    + "frame, everything included · stream for other programs: "
    + `/stream/${names[0]}/overlay.mjpg · figures: /stats.json, /metrics`);
  chose();
}

function choices(group, values, titles, role, flag, choose) {
  // Buttons of which one is on; arrow keys go through them, as through radio buttons.
  group.replaceChildren(
    ...values.map((value) => {
      const button = make("button", "", titles[value] || value);
      button.type = "button";
      button.setAttribute("role", role);
      button.dataset.value = value;
      button.addEventListener("click", () => choose(value));
      return button;
    }),
  );
  group.dataset.flag = flag;
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const place = values.indexOf(event.target.dataset.value);
    const next = (place + step + values.length) % values.length;
    choose(values[next]);
    group.children[next].focus();
  });
}

function mark(group, value) {
  for (const button of group.children) {
    const on = button.dataset.value === value;
    button.setAttribute(group.dataset.flag, String(on));
    button.tabIndex = on ? 0 : -1;
  }
}

function card(name, place, many) {
  const article = make("article", "source");
  article.id = `source-${place}`;
  article.setAttribute("aria-label", name);
  const screen = make("div", "screen pending");
  const canvas = make("canvas");
  canvas.setAttribute("role", "img");
  const over = make("p", "over", "Waiting for the first picture");
  const rec = make("span", "rec");
  rec.hidden = true;
  screen.append(canvas, over, rec);

  const bar = make("div", "bar");
  const who = make("div", "who");
  const title = make(many ? "button" : "span", "name", name);
  if (many) {
    title.type = "button";
    title.title = "Show the figures of this source";
    title.addEventListener("click", () => {
      state.chosen = name;
      chose();
    });
  }
  const status = make("span", "state");
  status.dataset.state = "opening";
  const numbers = make("span", "numbers");
  const uri = make("span", "uri");
  who.append(title, status, numbers, uri);
  const actions = make("div", "actions");
  const record = make("button", "action");
  record.type = "button";
  record.append(make("span", "dot"), make("span", "", "Record"));
  record.setAttribute("aria-pressed", "false");
  record.setAttribute("aria-label", `Record ${name}`);
  record.addEventListener("click", () => toggleRecording(name));
  if (!state.page.recordings) {
    record.disabled = true;
    record.title = "There is no folder for recordings; start the program with --recordings FOLDER";
  }
  const save = make("a", "action", "Save picture");
  save.setAttribute("aria-label", `Save the picture of ${name}`);
  actions.append(record, save);
  bar.append(who, actions);
  article.append(screen, bar);
  state.cards.set(name, {
    article, screen, canvas, over, rec, status, numbers, uri, record, save, title, frame: -1,
  });
  return article;
}

function chose() {
  // What follows from the view, or from the source whose figures are shown.
  mark(el("views"), state.view);
  if (state.page.names.length > 1) mark(el("tabs"), state.chosen);
  for (const [name, parts] of state.cards) {
    const on = name === state.chosen;
    parts.article.classList.toggle("chosen", on);
    if (parts.title.tagName === "BUTTON") parts.title.setAttribute("aria-pressed", String(on));
    parts.canvas.setAttribute("aria-label", `${VIEW_NAMES[state.view]} of ${name}, live`);
    parts.save.href = path("snapshot", name, `${state.view}.png`);
    parts.save.download = `${name}-${state.view}.png`;
  }
  const many = state.page.names.length > 1;
  el("of").hidden = !many;
  put(el("of-name"), state.chosen);
  const hash = new URLSearchParams();
  if (state.view !== state.page.views[0]) hash.set("view", state.view);
  if (state.chosen !== state.page.names[0]) hash.set("source", state.chosen);
  const address = location.pathname + (hash.size ? `#${hash}` : "");
  history.replaceState(null, "", address);
  pictures.wish();
  show();
}

// --- figures

function show() {
  const stats = state.stats;
  if (!stats) return;
  put(el("model"), stats.model);
  document.title = `${stats.model} · EdgeSeg`;
  const [height, width] = stats.network_size;
  put(el("engine"), `${stats.description} · network ${width}×${height} · running for `
    + `${duration(stats.uptime_s)}`);
  for (const source of stats.sources) showSource(source);
  const chosen = stats.sources.find((source) => source.name === state.chosen);
  if (chosen) showChosen(chosen);
  showMachine(stats.reading);
  showOutlets(stats.outlets);
  showRecordings();
  showLegend();
  charts();
}

function showSource(source) {
  const parts = state.cards.get(source.name);
  if (!parts) return;
  const status = source.status;
  const failed = source.error !== null;
  const name = failed ? "failed" : STATE_NAMES[status.state] || status.state;
  const told = parts.status.dataset.state;
  parts.status.dataset.state = failed ? "failed" : status.state;
  parts.article.dataset.state = status.state;
  const waits = status.state === "stalled" || status.state === "reconnecting";
  put(parts.status, waits ? `${name} for ${duration(status.for_s)}` : name);
  if (told !== parts.status.dataset.state && told !== "opening") say(`${source.name}: ${name}`);
  put(parts.numbers, `${source.fps.toFixed(1)} fps · ${ms(source.summary.mask_age_ms.p50)} ms`);
  const size = source.size ? ` · ${source.size[1]}×${source.size[0]}` : "";
  put(parts.uri, source.uri + size);
  parts.uri.title = source.uri;
  const reason = source.error || (status.state === "live" ? "" : status.reason);
  const drawn = parts.frame >= 0;
  const sentence = reason ? `${name[0].toUpperCase()}${name.slice(1)}: ${reason}` : "";
  put(parts.over, sentence || (drawn ? "" : "Waiting for the first picture"));
  parts.over.hidden = drawn && !sentence;
}

function showChosen(source) {
  const { summary, tally } = source;
  put(el("fps"), source.fps.toFixed(1));
  put(el("age50"), summary.frames ? ms(summary.mask_age_ms.p50) : "–");
  put(el("age99"), summary.frames ? ms(summary.mask_age_ms.p99) : "–");
  for (const row of el("stages").children) {
    const times = summary.stages[row.dataset.stage];
    const [, p50, p95, p99] = row.children;
    put(p50, ms(times && times.p50_ms));
    put(p95, ms(times && times.p95_ms));
    put(p99, ms(times && times.p99_ms));
  }
  for (const part of el("stack").children) {
    const times = summary.stages[part.dataset.stage];
    part.style.flexGrow = String(times ? times.p50_ms : 0);
    part.title = times ? `${part.dataset.stage} ${ms(times.p50_ms)} ms` : "";
  }
  facts(el("frames"), [
    ["finished", whole.format(summary.frames)],
    ["dropped", whole.format(summary.dropped)],
    ["superseded", whole.format(source.superseded)],
    ["damaged", whole.format(tally.damaged)],
    ["repeated", whole.format(tally.stale)],
    ["reconnected", `${whole.format(tally.reconnects)}×`],
  ]);
}

function facts(list, entries) {
  while (list.children.length < entries.length) {
    const row = make("div");
    row.append(make("dt"), make("dd"));
    list.append(row);
  }
  while (list.children.length > entries.length) list.lastChild.remove();
  entries.forEach(([name, value, kind], place) => {
    const [term, data] = list.children[place].children;
    put(term, name);
    put(data, value);
    data.className = kind || "";
  });
}

function showMachine(reading) {
  const r = reading || {};
  const unit = (value, digits, name) => (value === null || value === undefined
    ? NONE : `${fixed(value, digits)} ${name}`);
  const throttled = r.throttled === null || r.throttled === undefined
    ? NONE : r.throttled ? "yes" : "no";
  const entries = [
    ["CPU", unit(r.cpu_percent, 0, "%")],
    ["memory", unit(r.rss_mb, 0, "MB")],
    ["GPU", unit(r.gpu_percent, 0, "%")],
    ["GPU memory", unit(r.gpu_memory_mb, 0, "MB")],
    ["temperature", unit(r.temperature_c, 0, "°C")],
    ["power", unit(r.power_w, 1, "W")],
    ["throttled", throttled, r.throttled ? "bad" : ""],
    ["threads", String(state.stats.threads.length)],
  ];
  const missing = entries.filter(([, value]) => value === NONE).map(([name]) => name);
  facts(el("machine"), entries.filter(([, value]) => value !== NONE));
  const from = (r.sources || []).join(", ");
  put(el("machine-note"), [
    missing.length ? `${NONE}: ${missing.join(", ")}` : "", from ? `from ${from}` : "",
  ].filter(Boolean).join(" · "));
}

function showOutlets(outlets) {
  el("outlets-card").hidden = outlets.length === 0;
  rows(el("outlets"), outlets.map((outlet) => {
    const busy = outlet.busy_s >= 1 ? ` · busy for ${duration(outlet.busy_s)}` : "";
    return {
      main: outlet.name,
      more: `${outlet.policy === "wait" ? "waits" : "drops"} · ${whole.format(outlet.written)} `
        + `written · ${whole.format(outlet.dropped)} dropped${busy}`,
      bad: outlet.error || "",
    };
  }));
}

function rows(list, entries) {
  while (list.children.length < entries.length) {
    const item = make("li");
    item.append(make("span", "main"), make("span", "more"), make("span", "bad"));
    list.append(item);
  }
  while (list.children.length > entries.length) list.lastChild.remove();
  entries.forEach((entry, place) => {
    const [main, more, bad] = list.children[place].children;
    if (entry.href) {
      let link = main.firstElementChild;
      if (!link) {
        link = make("a");
        main.replaceChildren(link);
      }
      link.href = entry.href;
      link.download = entry.main;
      put(link, entry.main);
    } else {
      put(main, entry.main);
    }
    put(more, entry.more);
    put(bad, entry.bad || "");
    bad.hidden = !entry.bad;
  });
}

function showLegend() {
  const shares = state.shares[state.chosen];
  el("legend-note").hidden = !shares;
  for (const item of el("legend").children) {
    const share = shares ? shares[item.dataset.name] || 0 : null;
    const text = share === null || share === 0 ? ""
      : share < 0.001 ? "<0.1 %" : `${(share * 100).toFixed(1)} %`;
    put(item.lastChild, text);
    item.classList.toggle("absent", share === 0);
  }
}

// --- charts

function charts() {
  const past = state.past[state.chosen] || [];
  const seconds = state.page.history_s;
  // As wide as there is something to show, and a minute at least.
  const first = past.length ? past[0][0] : state.now;
  const span = Math.min(Math.max(state.now - first, 60), seconds);
  put(el("axis-from"), span >= 120 ? `${Math.round(span / 60)} min ago` : `${span} s ago`);
  const rates = past.map(([at], place) => {
    const some = past.slice(Math.max(place - SMOOTH_S + 1, 0), place + 1);
    return [at, some.reduce((sum, second) => sum + second[1], 0) / some.length];
  });
  const ages = past.map(([at, , age]) => [at, age]);
  chart(el("fps-chart"), rates, span, 0);
  chart(el("age-chart"), ages, span, 1);
  const last = past[past.length - 1];
  put(el("fps-now"), last ? rates[rates.length - 1][1].toFixed(1) : "");
  put(el("age-now"), last && last[2] !== null ? ms(last[2]) : "");
}

function chart(svg, points, span, colour) {
  const width = svg.clientWidth || 300;
  const height = svg.clientHeight || 62;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const top = ceiling(Math.max(0, ...points.map(([, value]) => value || 0)));
  const room = 30; // for the numbers of the axis, on the left
  const x = (at) => room + (width - room) * (1 - (state.now - 1 - at) / Math.max(span - 1, 1));
  const y = (value) => height - 1 - (height - 9) * (value / top);
  const shapes = [];
  for (const value of [0, top / 2, top]) {
    shapes.push(shape("path", { class: "grid", d: `M${room} ${y(value)}H${width}` }));
    if (value) {
      const text = shape("text", { x: room - 6, y: y(value) + 4, "text-anchor": "end" });
      text.textContent = compact.format(value);
      shapes.push(text);
    }
  }
  for (const run of runs(points.filter(([at]) => x(at) >= room))) {
    const line = run.map(([at, value], place) => (
      `${place ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`)).join("");
    const from = x(run[0][0]).toFixed(1);
    const to = x(run[run.length - 1][0]).toFixed(1);
    shapes.push(shape("path", { class: `area a${colour}`, d: `${line}V${y(0)}H${from}Z` }));
    shapes.push(shape("path", { class: `line c${colour}`, d: from === to ? `${line}h1` : line }));
  }
  svg.replaceChildren(...shapes);
}

function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  return node;
}

function runs(points) {
  // Parts without gaps: a second in which nothing came has no age.
  const found = [];
  let run = [];
  for (const point of points) {
    if (point[1] === null) {
      if (run.length) found.push(run);
      run = [];
    } else {
      run.push(point);
    }
  }
  if (run.length) found.push(run);
  return found;
}

function ceiling(value) {
  // The next of 1, 2, 4, 6, 10 times a power of ten: half of each is a number to read.
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 6, 10].find((step) => step * power >= value * 1.02 || step === 10);
}

// --- recordings

function runningOf(name) {
  return state.recordings.running.find((recording) => recording.source === name);
}

function showRecordings() {
  const { running, finished, notes } = state.recordings;
  const since = (performance.now() - state.recordingsAt) / 1000;
  for (const [name, parts] of state.cards) {
    const recording = runningOf(name);
    parts.rec.hidden = !recording;
    if (recording) put(parts.rec, clock(recording.seconds + since));
    parts.record.setAttribute("aria-pressed", String(Boolean(recording)));
    put(parts.record.lastChild, recording ? "Stop" : "Record");
    parts.record.disabled = !state.page.recordings || state.busy.has(name);
  }
  const note = el("recordings-note");
  const told = Object.entries(notes).map(([name, reason]) => `${name}: ${reason}`).join(" ");
  const bad = state.problem || told;
  note.classList.toggle("bad", Boolean(bad));
  put(note, bad || (!state.page.recordings
    ? "There is no folder for them; start the program with --recordings FOLDER."
    : running.length + finished.length ? "" : "None yet."));
  note.hidden = !note.textContent;
  rows(el("recordings"), [
    ...running.map((recording) => ({
      main: `${recording.source}, ${clock(recording.seconds + since)}`,
      more: `recording · ${whole.format(recording.written)} pictures · `
        + `${whole.format(recording.dropped)} dropped`,
      bad: recording.error || "",
    })),
    ...finished.map((video) => ({
      main: video.file, href: video.url, more: bytes(video.size),
    })),
  ]);
}

async function toggleRecording(name) {
  if (state.busy.has(name)) return;
  const recording = runningOf(name);
  state.busy.add(name);
  state.problem = "";
  showRecordings();
  try {
    const answer = recording
      ? await fetch(path("recordings", recording.id), { method: "DELETE" })
      : await fetch("/recordings", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ source: name }),
      });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    say(recording ? `The recording of ${name} is finished` : `${name} is being recorded`);
    const list = await fetch("/recordings");
    if (list.ok) takeRecordings(await list.json());
  } catch (error) {
    state.problem = error instanceof TypeError ? "The program did not answer." : error.message;
    say(state.problem);
  }
  state.busy.delete(name);
  showRecordings();
}

function takeRecordings(recordings) {
  state.recordings = recordings;
  state.recordingsAt = performance.now();
}

// --- the connection

const link = {
  source: null,
  heard: 0,
  lostAt: null,

  open() {
    this.close();
    const events = new EventSource("/events");
    this.source = events;
    events.onmessage = (message) => this.take(JSON.parse(message.data));
    events.onerror = () => {
      this.lose();
      // The browser tries again by itself, unless it was refused.
      if (events.readyState === EventSource.CLOSED && this.source === events) {
        this.source = null;
        this.explain();
        setTimeout(() => this.source || this.open(), RETRY_MS);
      }
    };
  },

  close() {
    if (this.source) this.source.close();
    this.source = null;
  },

  take(event) {
    if (event.run !== state.page.run) {
      // The program was started anew: its sources and classes may be others.
      this.close();
      location.reload();
      return;
    }
    this.heard = performance.now();
    if (this.lostAt !== null) {
      say("The connection is back");
      pictures.open();
    }
    this.lostAt = null;
    el("banner").hidden = true;
    document.body.classList.remove("lost");
    this.status("live", "Live");
    state.stats = event.stats;
    state.shares = event.shares;
    state.now = event.now;
    takeRecordings(event.recordings);
    for (const [name, seconds] of Object.entries(event.past)) {
      const known = (state.past[name] || []).filter(
        ([at]) => at > event.now - state.page.history_s - 1 && (!seconds.length || at < seconds[0][0]),
      );
      state.past[name] = known.concat(seconds);
    }
    show();
  },

  lose() {
    if (this.lostAt !== null) return;
    this.lostAt = Date.now();
    const since = new Date(this.lostAt).toLocaleTimeString();
    const banner = el("banner");
    put(banner, `The connection to the program is lost since ${since}. Trying again…`);
    banner.hidden = false;
    document.body.classList.add("lost");
    this.status("lost", "No connection");
  },

  async explain() {
    try {
      const answer = await fetch("/page.json");
      if (!answer.ok) put(el("banner"), `${(await answer.text()).trim()} Trying again…`);
    } catch {
      // It is not there: the banner says so already.
    }
  },

  status(kind, text) {
    const node = el("link");
    node.dataset.state = kind;
    put(node, text);
  },

  watch() {
    if (this.heard && performance.now() - this.heard > SILENCE_MS && !document.hidden) {
      this.lose();
      // A connection that is silent may be dead without knowing it.
      this.heard = performance.now();
      this.open();
    }
  },
};

const pictures = {
  socket: null,
  round: 0,
  watched: [],
  timer: 0,

  open() {
    if (this.socket) {
      this.socket.onclose = null;
      this.socket.close();
    }
    clearTimeout(this.timer);
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.wish();
    socket.onmessage = (message) => this.take(socket, message.data);
    socket.onclose = () => {
      this.socket = null;
      this.timer = setTimeout(() => this.socket || this.open(), RETRY_MS);
    };
    this.socket = socket;
  },

  wish() {
    // Only what is seen is asked for: a window in the background costs nothing.
    const seen = document.hidden ? [] : state.page.names.filter(
      (name) => state.cards.get(name).article.offsetParent !== null,
    );
    this.watched = seen;
    this.round = (this.round + 1) % 65536;
    this.send({ watch: seen.map((name) => [name, state.view]), round: this.round });
  },

  send(wish) {
    if (this.socket && this.socket.readyState === WebSocket.OPEN) {
      this.socket.send(JSON.stringify(wish));
    }
  },

  async take(socket, data) {
    const head = new DataView(data);
    const round = head.getUint16(0, true);
    const place = head.getUint16(2, true);
    if (round !== this.round || place >= this.watched.length) return;
    const parts = state.cards.get(this.watched[place]);
    try {
      const bitmap = await createImageBitmap(new Blob([data.slice(8)], { type: "image/jpeg" }));
      if (round === this.round) draw(parts, bitmap, head.getUint32(4, true));
      bitmap.close();
    } catch {
      // A picture that cannot be shown is left out; the next one may do.
    }
    if (socket === this.socket) this.send({ shown: [round, place] });
  },
};

function draw(parts, bitmap, frame) {
  const canvas = parts.canvas;
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
    parts.screen.style.aspectRatio = `${bitmap.width} / ${bitmap.height}`;
    if (state.page.names.length === 1) {
      el("main").style.setProperty("--ratio", String(bitmap.width / bitmap.height));
    }
  }
  canvas.getContext("2d", { alpha: false }).drawImage(bitmap, 0, 0);
  canvas.dataset.frame = String(frame);
  if (parts.frame < 0) {
    parts.screen.classList.remove("pending");
    parts.over.hidden = true;
  }
  parts.frame = frame;
}

async function start() {
  // The cookie has the token from here on; the address need not show it.
  const address = new URL(location.href);
  if (address.searchParams.has("token")) {
    address.searchParams.delete("token");
    history.replaceState(null, "", address);
  }
  for (;;) {
    try {
      const answer = await fetch("/page.json");
      if (answer.ok) {
        state.page = await answer.json();
        break;
      }
      link.lose();
      put(el("banner"), (await answer.text()).trim());
    } catch {
      link.lose();
    }
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
  build();
  link.open();
  pictures.open();
  setInterval(() => link.watch(), 1000);
  document.addEventListener("visibilitychange", () => pictures.wish());
  const narrow = matchMedia("(max-width: 640px)");
  narrow.addEventListener("change", () => pictures.wish());
  addEventListener("resize", () => charts());
}

start();
