"use strict";
// The list of clips: search, filters, sorting, and rows that open to the differences of two systems.
// Texts of clips only ever become text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE_ROWS = 25;

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  };
  const byId = (id) => document.getElementById(id);
  const percent = (share) => `${(100 * share).toFixed(0)} %`;
  const seconds = (value) => (value === undefined ? "" : `${value.toFixed(1)} s`);
  const debounced = (action) => {
    let timer;
    return () => { clearTimeout(timer); timer = setTimeout(action, 120); };
  };

  data.clips.forEach((clip, place) => {
    clip.place = place;
    const texts = Object.values(clip.answers).map((answer) => answer.text || "");
    const known = [clip.id, clip.set, clip.speaker, clip.source, clip.reference, ...texts];
    clip.searched = known.filter(Boolean).join("\n").toLowerCase();
  });

  // What two systems make of a clip

  const state = { a: data.systems[0], b: data.systems[1], sort: "errors", descending: true, first: 0, open: new Set() };
  const answer = (clip, system) => clip.answers[system];
  const errors = (clip, system) => answer(clip, system)?.errors ?? -1;
  const gap = (clip) => (state.b === undefined ? 0 : errors(clip, state.a) - errors(clip, state.b));
  const confidence = (clip) => answer(clip, state.a)?.confidence;
  const isWrong = (clip) => errors(clip, state.a) > 0;
  const hasFailed = (clip) => Object.values(clip.answers).some((one) => one.text === null);

  const KINDS = {
    all: ["all clips", () => true],
    wrong: ["first system is wrong", isWrong],
    right: ["first system is right", (clip) => errors(clip, state.a) === 0],
    differ: ["systems differ", (clip) => gap(clip) !== 0],
    worse: ["first system is worse", (clip) => gap(clip) > 0],
    better: ["first system is better", (clip) => gap(clip) < 0],
    sure: ["sure and wrong", (clip) => isWrong(clip) && confidence(clip) > 0.8],
    agree: ["systems agree against the label", (clip) => clip.agreeing > 0],
    failed: ["failed or flagged", (clip) => hasFailed(clip) || Object.values(clip.answers).some((one) => one.flags)],
    audio: ["with audio", (clip) => clip.audio !== undefined],
  };

  const columns = () => [
    { key: "id", title: "Clip", value: (clip) => clip.id },
    { key: "set", title: "Set", value: (clip) => clip.set, optional: true },
    { key: "speaker", title: "Speaker", value: (clip) => clip.speaker ?? "", optional: true },
    { key: "source", title: "Source", value: (clip) => clip.source ?? "", optional: true },
    { key: "duration", title: "Length", value: (clip) => clip.duration_s ?? -1, number: true, optional: true },
    { key: "words", title: "Words", value: (clip) => clip.words, number: true, optional: true },
    { key: "errors", title: `Errors: ${state.a}`, value: (clip) => errors(clip, state.a), number: true },
    { key: "errors-b", title: `Errors: ${state.b}`, value: (clip) => errors(clip, state.b), number: true, pair: true },
    { key: "gap", title: "Difference", value: (clip) => Math.abs(gap(clip)), number: true, pair: true, optional: true },
    {
      key: "confidence", title: "Confidence", value: (clip) => confidence(clip) ?? -1, number: true, optional: true,
    },
  ].filter((column) => (!column.pair || state.b !== undefined) && isTold(column));
  const told = {
    set: data.sets.length > 1, speaker: data.clips.some((clip) => clip.speaker),
    source: data.clips.some((clip) => clip.source), duration: data.clips.some((clip) => clip.duration_s),
    confidence: data.clips.some((clip) => Object.values(clip.answers).some((one) => one.confidence !== undefined)),
  };
  const isTold = (column) => told[column.key] ?? true;

  const cellText = (column, clip) => {
    const value = column.value(clip);
    if (column.key === "duration") return seconds(clip.duration_s);
    if (column.key === "confidence") return value < 0 ? "" : percent(value);
    if (column.key === "gap") return gap(clip) > 0 ? `+${gap(clip)}` : String(gap(clip)).replace("-", "−");
    return value === -1 ? "–" : String(value);
  };

  const chosen = () => {
    const wanted = byId("clip-search").value.trim().toLowerCase();
    const set = byId("clip-set").value;
    const [, isKind] = KINDS[byId("clip-kind").value];
    const { value } = columns().find((column) => column.key === state.sort) ?? columns()[0];
    const sign = state.descending ? -1 : 1;
    const compare = (one, other) => {
      const [x, y] = [value(one), value(other)];
      const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return sign * order || one.place - other.place;
    };
    return data.clips
      .filter((clip) => (!set || clip.set === set) && clip.searched.includes(wanted) && isKind(clip))
      .sort(compare);
  };

  // A clip that is open

  const differenceOf = (parts) => {
    const found = element("p", { class: "difference text", dir: "auto" });
    for (const [sign, reference, own] of parts) {
      if (found.childNodes.length) found.append(" ");
      if (sign === "=") found.append(reference);
      else if (sign === "-") found.append(element("s", { class: "minus" }, reference));
      else if (sign === "+") found.append(element("ins", { class: "plus" }, own));
      else found.append(element("span", { class: "swap" }, element("s", {}, reference), " ", element("ins", {}, own)));
    }
    if (!parts.length) found.append("(no words)");
    return found;
  };

  const systemView = (clip, system) => {
    const one = answer(clip, system);
    if (!one) return element("div", {}, element("h3", {}, system), element("p", {}, "does not transcribe this set"));
    const rate = clip.words ? `, ${percent(one.errors / clip.words)} of ${clip.words} words` : "";
    const sure = one.confidence === undefined ? "" : `, confidence ${percent(one.confidence)}`;
    const title = `${system}: ${one.errors} ${one.errors === 1 ? "error" : "errors"}${rate}${sure}`;
    const flags = one.flags ? element("p", { class: "fault text" }, `flags: ${one.flags.join(", ")}`) : null;
    const said = one.text === null
      ? element("p", { class: "fault text" }, one.error ?? "no answer")
      : element("p", { class: "text faint", dir: "auto" }, one.text || "(nothing written)");
    return element("div", {}, element("h3", {}, title), differenceOf(one.difference ?? []), said, flags);
  };

  const audioView = (clip) => {
    const stored = clip.audio === undefined ? null : byId(`audio-${clip.audio}`);
    if (!stored) return [];
    const found = JSON.parse(stored.textContent);
    const player = element("audio", {
      controls: true, preload: "none", src: `data:${found.type};base64,${found.audio}`, "aria-label": `Audio of ${clip.id}`,
    });
    const length = seconds(clip.duration_s);
    const label = `Log-mel spectrogram of ${clip.id}${length && `, ${length}`}, low frequencies at the bottom`;
    return [player, found.mel ? element("img", { class: "mel", alt: label, src: `data:image/png;base64,${found.mel}` }) : null];
  };

  const detail = (clip, width) => {
    const systems = [state.a, ...(state.b === undefined || state.b === state.a ? [] : [state.b])];
    return element("tr", { class: "clip-detail" }, element("td", { colspan: width },
      element("h3", {}, "Reference"), element("p", { class: "text", dir: "auto" }, clip.reference || "(no words)"),
      element("div", { class: "side-by-side" }, ...systems.map((system) => systemView(clip, system))),
      ...audioView(clip)));
  };

  // The table

  const heading = (column) => {
    const isSorted = column.key === state.sort;
    const order = state.descending ? "descending" : "ascending";
    const sort = () => {
      state.descending = isSorted ? !state.descending : Boolean(column.number);
      Object.assign(state, { sort: column.key, first: 0 });
      draw();
      byId(`sort-${column.key}`).focus();
    };
    const classes = [column.number && "number", column.optional && "optional"].filter(Boolean).join(" ");
    const mark = isSorted ? (state.descending ? " ↓" : " ↑") : "";
    return element("th", { scope: "col", class: classes || null, "aria-sort": isSorted ? order : null },
      element("button", { type: "button", id: `sort-${column.key}`, on: { click: sort } }, column.title + mark));
  };

  const rowOf = (clip, shown) => {
    const isOpen = state.open.has(clip.place);
    const toggle = () => {
      if (!state.open.delete(clip.place)) state.open.add(clip.place);
      draw();
      byId(`clip-${clip.place}`)?.focus();
    };
    const cells = shown.map((column) => {
      const classes = [column.number && "number", column.optional && "optional"].filter(Boolean).join(" ");
      if (column.key !== "id") return element("td", { class: classes || null }, element("bdi", {}, cellText(column, clip)));
      const attributes = {
        type: "button", class: "row-button", id: `clip-${clip.place}`, "aria-expanded": String(isOpen), on: { click: toggle },
      };
      const mark = clip.audio === undefined ? null : element("span", { title: "with audio" }, " ♪");
      return element("td", {}, element("button", attributes, element("bdi", {}, clip.id), mark));
    });
    const row = element("tr", { class: "clip-row" }, ...cells);
    return isOpen ? [row, detail(clip, shown.length)] : [row];
  };

  const pager = (count) => {
    if (count <= PAGE_ROWS) return null;
    const move = (step) => () => {
      state.first += step;
      draw();
      byId("clips").scrollIntoView();
    };
    const last = Math.min(count, state.first + PAGE_ROWS);
    return element("div", { class: "pager" },
      element("button", { type: "button", disabled: state.first === 0, on: { click: move(-PAGE_ROWS) } }, "Previous"),
      element("span", {}, `${state.first + 1} to ${last} of ${count}`),
      element("button", { type: "button", disabled: last >= count, on: { click: move(PAGE_ROWS) } }, "Next"));
  };

  const draw = () => {
    const clips = chosen();
    if (state.first >= clips.length) state.first = 0;
    const shown = columns();
    const rows = clips.slice(state.first, state.first + PAGE_ROWS).flatMap((clip) => rowOf(clip, shown));
    byId("clip-count").textContent = `${clips.length} of ${data.clips.length} clips`;
    const table = element("table", {},
      element("thead", {}, element("tr", {}, ...shown.map(heading))), element("tbody", {}, ...rows));
    const region = element("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "List of clips" }, table);
    byId("clip-table").replaceChildren(...[region, pager(clips.length)].filter(Boolean));
  };

  const start = () => {
    const option = (value, title) => element("option", { value }, title);
    byId("clip-set").append(...data.sets.map((name) => option(name, name)));
    byId("clip-kind").append(...Object.entries(KINDS).map(([key, [title]]) => option(key, title)));
    for (const [id, key] of [["system-a", "a"], ["system-b", "b"]]) {
      const choice = byId(id);
      choice.append(...data.systems.map((name) => option(name, name)));
      if (state[key] === undefined) choice.closest("label").hidden = true;
      else choice.value = state[key];
      choice.addEventListener("change", () => { state[key] = choice.value; draw(); });
    }
    if (data.sets.length < 2) byId("clip-set").closest("label").hidden = true;
    const again = () => { state.first = 0; draw(); };
    byId("clip-search").addEventListener("input", debounced(again));
    byId("clip-set").addEventListener("change", again);
    byId("clip-kind").addEventListener("change", again);
    byId("clip-controls").addEventListener("submit", (event) => event.preventDefault());
    byId("clip-controls").hidden = false;
    let before;
    addEventListener("beforeprint", () => {
      before = new Set(state.open);
      chosen().slice(state.first, state.first + PAGE_ROWS).forEach((clip) => state.open.add(clip.place));
      draw();
    });
    addEventListener("afterprint", () => { state.open = before; draw(); });
    draw();
  };

  // The label audit: a verdict and a note for each suspicious clip, kept in the browser, exported and imported as JSON

  const VERDICTS = {
    "": "not judged", same: "no real difference", label: "the label is wrong", model: "the model is wrong",
    both: "both are wrong", ambiguous: "ambiguous",
  };
  const store = `graft-audit ${document.title} ${data.audit.map((place) => data.clips[place].id).join(" ").length}`;
  const verdicts = new Map();
  const keyOf = (clip) => JSON.stringify([clip.set, clip.id]);
  const remember = () => {
    try { localStorage.setItem(store, JSON.stringify([...verdicts])); } catch { /* the browser keeps nothing here */ }
  };
  const remembered = () => {
    try { return JSON.parse(localStorage.getItem(store)) ?? []; } catch { return []; }
  };

  const tellProgress = (said = "") => {
    const judged = data.audit.map((place) => verdicts.get(keyOf(data.clips[place]))?.verdict).filter(Boolean);
    const counts = Object.entries(VERDICTS).map(([key, title]) => [title, judged.filter((one) => one === key).length]);
    const told = counts.filter(([, count]) => count).map(([title, count]) => `${title} ${count}`).join(", ");
    byId("audit-status").textContent = `${judged.length} of ${data.audit.length} judged${told && `: ${told}`}. ${said}`;
  };

  const auditRow = (clip, number) => {
    const key = keyOf(clip);
    const given = () => verdicts.get(key) ?? { verdict: "", note: "" };
    const change = (name) => (event) => {
      verdicts.set(key, { ...given(), [name]: event.target.value });
      remember();
      tellProgress();
    };
    const choice = element("select", { "aria-label": `Verdict on ${clip.id}`, on: { change: change("verdict") } },
      ...Object.entries(VERDICTS).map(([value, title]) => element("option", { value }, title)));
    choice.value = given().verdict;
    const note = element("textarea", { rows: "2", "aria-label": `Note on ${clip.id}`, on: { input: change("note") } });
    note.value = given().note;
    const texts = Object.entries(clip.answers).flatMap(([system, one]) => [
      element("dt", {}, system), element("dd", { dir: "auto" }, one.text === null ? "no answer" : one.text || "(nothing written)")]);
    const sure = confidence(clip);
    return element("tr", { class: "clip-row" },
      element("td", { class: "number" }, String(number)),
      element("td", { class: "audit-texts" },
        element("p", { class: "text small faint" }, element("bdi", {}, clip.id), sure === undefined ? "" : `, confidence ${percent(sure)}`),
        element("dl", {}, element("dt", {}, "label"), element("dd", { dir: "auto" }, clip.reference || "(no words)"), ...texts),
        ...audioView(clip)),
      element("td", {}, choice), element("td", {}, note));
  };

  const drawAudit = () => {
    const titles = ["No.", "Clip", "Verdict", "Note"].map((title) => element("th", { scope: "col" }, title));
    const rows = data.audit.map((place, at) => auditRow(data.clips[place], at + 1));
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...titles)), element("tbody", {}, ...rows));
    byId("audit-table").replaceChildren(
      element("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Sheet of the label audit" }, table));
    tellProgress();
  };

  const exported = () => data.audit.map((place) => {
    const clip = data.clips[place];
    const hypotheses = Object.fromEntries(Object.entries(clip.answers).map(([system, one]) => [system, one.text]));
    const known = { set: clip.set, id: clip.id, reference: clip.reference, hypotheses };
    return { ...known, ...(verdicts.get(keyOf(clip)) ?? { verdict: "", note: "" }) };
  });

  const download = () => {
    const content = JSON.stringify({ model: document.title, verdicts: VERDICTS, clips: exported() }, null, 2);
    const link = element("a", { download: "label-audit.json", href: URL.createObjectURL(new Blob([content], { type: "application/json" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  };

  const importFile = async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    try {
      const known = new Set(data.audit.map((place) => keyOf(data.clips[place])));
      const told = JSON.parse(await file.text()).clips.filter((one) => known.has(keyOf(one)) && one.verdict in VERDICTS);
      told.forEach((one) => verdicts.set(keyOf(one), { verdict: one.verdict, note: String(one.note ?? "") }));
      remember();
      drawAudit();
      tellProgress(`${told.length} verdicts were imported.`);
    } catch {
      tellProgress("The file is no export of such a sheet.");
    }
    event.target.value = "";
  };

  const startAudit = () => {
    for (const [key, one] of remembered()) verdicts.set(key, one);
    byId("audit-controls").hidden = false;
    byId("audit-export").addEventListener("click", download);
    byId("audit-import").addEventListener("change", importFile);
    drawAudit();
  };

  if (data.clips.length && data.systems.length) start();
  if (data.audit.length) startAudit();
})();
