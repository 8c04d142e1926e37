/**
 * Charts of a log: each line smoothed and as it is, with the lowest and highest value of every bucket of steps, and what
 * is no number at the upper edge. Dragging zooms all of them, the pointer shows values, so do the arrow keys.
 */
const charts = (() => {
  const told = data("charts");
  const COLORS = [
    "#2f7ed8", "#e4572e", "#2ca02c", "#9467bd", "#d49b17", "#17a2b8", "#e377c2", "#8c6d5a", "#7f8fa6", "#a8b820",
  ];
  const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
  const PAD = { left: 56, right: 10, top: 16, bottom: 22 };
  const FEW = 50;  // points that are not smoothed
  const ODD = [["×", "NaN"], ["▲", "inf"], ["▼", "-inf"]];
  const first = Math.min(...Object.values(told.curves).map((curve) => curve.steps[0] ?? Infinity), told.steps);
  const state = { smooth: 0.6, log: false, outliers: true, from: null, to: null, hidden: new Set() };
  Object.assign(state, JSON.parse(kept.get("charts") ?? "{}"));
  const drawn = [];

  const color = (number) => COLORS[number % COLORS.length];
  const dash = (number) => DASHES[Math.floor(number / COLORS.length) % DASHES.length];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const whole = (number) => number.toLocaleString("en-US");

  function short(number) {
    const size = Math.abs(number);
    if (number === 0) return "0";
    if (size >= 1e9 || size < 1e-3) return number.toExponential(1).replace(/\.0e/, "e").replace("e+", "e");
    if (size >= 1e6) return `${+(number / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(number / 1e3).toPrecision(4)}k`;
    return `${+number.toPrecision(4)}`;
  }

  /** Round places between two numbers, about `count` of them. */
  function ticks(low, high, count, least = 0) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max([1, 2, 5, 10].find((times) => times * power >= rough) * power, least);
    const found = [];
    for (let place = Math.ceil(low / step) * step; place <= high + step * 1e-6; place += step) {
      found.push(Math.abs(place) < step * 1e-6 ? 0 : place);
      if (found.length > 50) break;
    }
    return found;
  }

  /** Powers of ten between two logarithms, with 2 and 5 in between where there are few, and plain ticks in a narrow range. */
  function logTicks(low, high) {
    const powers = [];
    const apart = Math.max(1, Math.ceil((high - low) / 7));
    for (let power = Math.ceil(low); power <= high; power += apart) powers.push(power);
    if (powers.length >= 3) return powers;
    const finer = [];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const times of [1, 2, 5]) finer.push(power + Math.log10(times));
    }
    const inside = finer.filter((place) => place >= low && place <= high);
    return inside.length >= 3 ? inside : ticks(10 ** low, 10 ** high, 4).filter((its) => its > 0).map(Math.log10);
  }

  /** An exponential moving average, without the pull of its beginning towards 0. */
  function smoothed(values) {
    if (!state.smooth || values.length < FEW) return values;
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = sum * state.smooth + value * (1 - state.smooth);
      weight = weight * state.smooth + (1 - state.smooth);
      return sum / weight;
    });
  }

  function place(steps, step) {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  }

  const shown = (chart) => chart.lines.filter((line) => !state.hidden.has(line.hidden_with));
  const range = () => {
    const from = state.from ?? first, to = state.to ?? told.steps;
    return to > from ? [from, to] : [from - 1, to + 1];
  };

  /** The range of values that a chart shows, in the scale that it has. */
  function extent(lines, from, to) {
    const values = [], means = [];
    for (const { curve, line } of lines) {
      curve.steps.forEach((step, i) => {
        if (step < from || step > to || curve.mean[i] === null) return;
        means.push(curve.mean[i], line[i]);
        values.push(curve.low[i] ?? curve.mean[i], curve.high[i] ?? curve.mean[i], line[i]);
      });
    }
    let used = (state.outliers ? values : means).filter((value) => !state.log || value > 0).sort((a, b) => a - b);
    if (!state.outliers) used = used.slice(Math.floor(used.length * 0.02), Math.ceil(used.length * 0.98));
    if (!used.length) return { low: 0, high: 1, left: values.length };
    const scale = state.log ? Math.log10 : (value) => value;
    let low = scale(used[0]), high = scale(used[used.length - 1]);
    const flat = high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high));
    const room = flat ? Math.abs(high) * 0.05 || 0.5 : (high - low) * 0.05;
    low -= room; high += room;
    return { low, high, left: state.log ? means.filter((value) => value <= 0).length : 0 };
  }

  function draw(one) {
    const { canvas, chart } = one, ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.font = "11px system-ui, sans-serif";
    const [from, to] = range();
    const lines = shown(chart).map((line) => {
      const curve = told.curves[line.curve];
      return { ...line, curve, line: smoothed(curve.mean) };
    });
    const { low, high, left } = extent(lines, from, to);
    const right = width - PAD.right, bottom = height - PAD.bottom;
    const x = (step) => PAD.left + (step - from) / (to - from) * (right - PAD.left);
    const y = (value) => {
      const scaled = state.log ? Math.log10(Math.max(value, 1e-300)) : value;
      return bottom - (scaled - low) / (high - low) * (bottom - PAD.top);
    };
    one.axes = { x, y, from, to, lines, left: PAD.left, right };
    one.left.textContent = left ? `values of 0 and below are not on a log scale` : "";

    pen.strokeStyle = style("--line"); pen.fillStyle = style("--faint"); pen.lineWidth = 1;
    pen.textAlign = "right"; pen.textBaseline = "middle";
    for (const tick of state.log ? logTicks(low, high) : ticks(low, high, 4)) {
      const value = state.log ? 10 ** tick : tick, at = Math.round(y(value)) + 0.5;
      pen.beginPath(); pen.moveTo(PAD.left, at); pen.lineTo(right, at); pen.stroke();
      pen.fillText(short(value), PAD.left - 6, at);
    }
    pen.textAlign = "center"; pen.textBaseline = "top";
    for (const tick of ticks(from, to, Math.max(2, Math.floor(width / 80)), 1)) {
      const text = short(tick), half = pen.measureText(text).width / 2;
      pen.fillText(text, Math.min(Math.max(x(tick), PAD.left + half), right - half), bottom + 5);
    }
    for (const mark of told.marks) {
      if (mark.step < from || mark.step > to) continue;
      const guard = mark.kind === "guard", at = Math.round(x(mark.step)) + 0.5;
      pen.strokeStyle = style(guard ? "--bad" : "--faint");
      pen.setLineDash(guard ? [] : [2, 4]);
      pen.beginPath(); pen.moveTo(at, guard ? bottom - 6 : PAD.top); pen.lineTo(at, bottom); pen.stroke();
    }
    pen.setLineDash([]);
    pen.save();
    pen.beginPath(); pen.rect(PAD.left, 0, right - PAD.left, bottom); pen.clip();
    for (const its of lines) band(pen, its, x, y, lines.length > 1 ? 0.22 : 0.45);
    for (const its of lines) {
      if (its.line !== its.curve.mean) path(pen, its, its.curve.mean, x, y, 0.35, 1);
      path(pen, its, its.line, x, y, 1, 1.8);
    }
    pen.restore();
    pen.fillStyle = style("--bad"); pen.textAlign = "center"; pen.textBaseline = "top";
    for (const { curve } of lines) {
      for (const [at, ...counts] of curve.odd) {
        const step = curve.steps[at];
        if (step < from || step > to) continue;
        counts.forEach((count, kind) => { if (count) pen.fillText(ODD[kind][0], x(step), 2); });
      }
    }
    if (one.hover !== null && one.hover !== undefined) crosshair(one, pen, bottom);
    if (one.drag && Math.abs(one.drag.to - one.drag.from) > 6) {
      pen.fillStyle = style("--accent"); pen.globalAlpha = 0.2;
      pen.fillRect(Math.min(one.drag.from, one.drag.to), PAD.top, Math.abs(one.drag.to - one.drag.from), bottom - PAD.top);
      pen.globalAlpha = 1;
    }
  }

  /** The lowest and highest value of each bucket, filled in between. */
  function band(pen, { curve, color: number }, x, y, alpha) {
    if (!curve.low.length) return;
    pen.fillStyle = color(number); pen.globalAlpha = alpha * 0.4;
    const there = curve.steps.map((_, i) => i).filter((i) => curve.low[i] !== null);
    pen.beginPath();
    there.forEach((i, nth) => pen[nth ? "lineTo" : "moveTo"](x(curve.steps[i]), y(curve.high[i])));
    [...there].reverse().forEach((i) => pen.lineTo(x(curve.steps[i]), y(curve.low[i])));
    pen.fill();
    pen.strokeStyle = color(number); pen.globalAlpha = alpha; pen.lineWidth = 1;
    for (const i of there) {  // a spike is seen, however narrow its bucket
      pen.beginPath(); pen.moveTo(x(curve.steps[i]), y(curve.low[i])); pen.lineTo(x(curve.steps[i]), y(curve.high[i])); pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  function path(pen, { curve, color: number }, values, x, y, alpha, width) {
    pen.strokeStyle = pen.fillStyle = color(number); pen.globalAlpha = alpha; pen.lineWidth = width;
    pen.setLineDash(dash(number)); pen.lineJoin = "round";
    pen.beginPath();
    let open = false;
    const points = [];
    values.forEach((value, i) => {
      if (value === null || (state.log && value <= 0)) { open = false; return; }
      const at = [x(curve.steps[i]), y(value)];
      pen[open ? "lineTo" : "moveTo"](...at);
      points.push(at);
      open = true;
    });
    pen.stroke();
    pen.setLineDash([]);
    if (points.length <= 40) for (const at of points) { pen.beginPath(); pen.arc(...at, width + 0.7, 0, 7); pen.fill(); }
    pen.globalAlpha = 1;
  }

  function crosshair(one, pen, bottom) {
    const { x, y, lines } = one.axes, at = x(one.hover);
    pen.strokeStyle = style("--faint");
    pen.beginPath(); pen.moveTo(at, PAD.top); pen.lineTo(at, bottom); pen.stroke();
    for (const its of lines) {
      if (!its.curve.steps.length) continue;
      const i = place(its.curve.steps, one.hover);
      if (its.line[i] === null) continue;
      pen.fillStyle = color(its.color);
      pen.beginPath(); pen.arc(x(its.curve.steps[i]), y(its.line[i]), 3.5, 0, 7); pen.fill();
    }
  }

  /** What the values beside the pointer are. */
  function tell(one) {
    const { tip, axes } = one;
    if (one.hover === null || !axes) { tip.hidden = true; return; }
    const rows = [];
    let step = null;
    for (const { label, curve, line, color: number } of axes.lines) {
      if (!curve.steps.length) continue;
      const i = place(curve.steps, one.hover);
      step ??= curve.width === 1 ? `step ${whole(curve.steps[i])}`
        : `steps about ${whole(curve.steps[i])}, ${whole(curve.width)} together`;
      const swatch = element("span", { class: "swatch" });
      swatch.style.background = color(number);
      const own = curve.mean[i] === null ? "no number" : (+curve.mean[i].toPrecision(5)).toString();
      const spread = curve.low.length && curve.low[i] !== null ? ` (${short(curve.low[i])} to ${short(curve.high[i])})` : "";
      const even = line !== curve.mean && line[i] !== null ? `, smoothed ${short(line[i])}` : "";
      const row = element("div", {}, swatch, `${axes.lines.length > 1 ? `${label}: ` : ""}${own}${spread}${even}`);
      const odd = curve.odd.find(([at]) => at === i);
      if (odd) {
        const counts = odd.slice(1).map((count, kind) => count ? `${count} × ${ODD[kind][1]}` : "").filter(Boolean);
        row.append(element("span", { class: "odd" }, ` ${counts.join(", ")}`));
      }
      rows.push(row);
    }
    const near = told.marks.filter((mark) => Math.abs(axes.x(mark.step) - axes.x(one.hover)) < 4).slice(0, 3);
    tip.replaceChildren(element("div", { class: "faint" }, step ?? ""), ...rows.slice(0, 14),
      ...near.map((mark) => element("div", {}, `${whole(mark.step)}: ${mark.text}`)));
    tip.hidden = rows.length === 0;
    const at = one.canvas.offsetLeft + axes.x(one.hover), room = one.canvas.offsetLeft + one.canvas.clientWidth;
    const left = at + 12 + tip.offsetWidth < room ? at + 12 : at - 12 - tip.offsetWidth;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${one.canvas.offsetTop + 20}px`;
  }

  let asked = false;
  function redraw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      for (const one of drawn) { draw(one); tell(one); }
      const zoomed = state.from !== null;
      for (const button of document.querySelectorAll("[data-charts=whole]")) button.disabled = !zoomed;
      const [from, to] = range().map(Math.round);
      for (const text of document.querySelectorAll("[data-charts=range]")) {
        text.textContent = zoomed ? `steps ${whole(from)} to ${whole(to)}` : "drag across a chart to zoom in";
      }
    });
  }

  function keep() {
    const { smooth, log, outliers } = state;
    kept.set("charts", JSON.stringify({ smooth, log, outliers }));
    redraw();
  }

  function zoom(from, to) {
    [state.from, state.to] = from === null || to - from < 1 ? [null, null] : [from, to];
    redraw();
  }

  function listen(one) {
    const { canvas } = one;
    const step = (event) => {
      const { from, to, left, right } = one.axes;
      const share = (event.offsetX - left) / (right - left);
      return from + Math.min(Math.max(share, 0), 1) * (to - from);
    };
    const show = (hover) => {
      one.hover = hover;
      draw(one); tell(one);
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      one.drag = { from: event.offsetX, to: event.offsetX, step: step(event) };
      canvas.setPointerCapture(event.pointerId);
      show(step(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (one.drag) one.drag.to = event.offsetX;
      show(step(event));
    });
    canvas.addEventListener("pointerup", (event) => {
      const drag = one.drag;
      one.drag = null;
      if (drag && Math.abs(drag.to - drag.from) > 6) {
        const to = step(event);
        zoom(Math.min(drag.step, to), Math.max(drag.step, to));
      } else show(step(event));
    });
    canvas.addEventListener("pointercancel", () => { one.drag = null; show(null); });
    canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && !one.drag) show(null); });
    canvas.addEventListener("blur", () => show(null));
    canvas.addEventListener("dblclick", () => zoom(null));
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") { zoom(null); return; }
      const curve = one.axes?.lines[0]?.curve;
      if (!by || !curve?.steps.length) return;
      event.preventDefault();
      const at = one.hover == null ? (by > 0 ? -1 : curve.steps.length) : place(curve.steps, one.hover);
      show(curve.steps[Math.min(Math.max(at + by, 0), curve.steps.length - 1)]);
    });
  }

  function legend(chart) {
    const made = element("div", { class: "legend" });
    for (const line of chart.lines) {
      const swatch = element("span", { class: "swatch" });
      swatch.style.background = color(line.color);
      const button = element("button", { type: "button", "data-hides": line.hidden_with, "aria-pressed": "true" }, swatch, line.label);
      button.addEventListener("click", () => toggle(line.hidden_with));
      made.append(button);
    }
    return made;
  }

  function toggle(what) {
    if (!state.hidden.delete(what)) state.hidden.add(what);
    for (const button of document.querySelectorAll("button[data-hides]")) {
      if (button.dataset.hides === what) button.setAttribute("aria-pressed", String(!state.hidden.has(what)));
    }
    redraw();
  }

  function make(chart, legends) {
    const said = `${chart.title}. ${chart.note} ${chart.odd}`.trim();
    const canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": said });
    const tip = element("div", { class: "tip" }), left = element("p", { class: "faint" });
    tip.hidden = true;
    const box = element("div", { class: "chart panel" }, element("h3", {}, chart.title));
    if (chart.note) box.append(element("p", { class: "faint" }, chart.note));
    if (chart.odd) box.append(element("p", { class: "odd" }, `not finite: ${chart.odd}`));
    box.append(canvas, left, tip);
    if (legends && chart.lines.length > 1) box.append(legend(chart));
    const one = { canvas, chart, tip, left, hover: null, drag: null, axes: null };
    drawn.push(one);
    listen(one);
    return box;
  }

  /** Put all charts into an element. */
  function show(target, legends = true) {
    for (const section of told.sections) {
      const grid = element("div", { class: "charts" }, ...section.charts.map((chart) => make(chart, legends)));
      if (!section.folded) { target.append(element("h2", {}, section.title), grid); continue; }
      const folded = element("details", {}, element("summary", {}, section.title), grid);
      folded.addEventListener("toggle", redraw);
      target.append(folded);
    }
    for (const range of document.querySelectorAll("[data-charts=smooth]")) {
      range.value = state.smooth;
      range.addEventListener("input", () => { state.smooth = +range.value; keep(); });
    }
    for (const name of ["log", "outliers"]) {
      for (const button of document.querySelectorAll(`[data-charts=${name}]`)) {
        button.setAttribute("aria-pressed", String(state[name]));
        button.addEventListener("click", () => {
          state[name] = !state[name];
          button.setAttribute("aria-pressed", String(state[name]));
          keep();
        });
      }
    }
    for (const button of document.querySelectorAll("[data-charts=whole]")) button.addEventListener("click", () => zoom(null));
    addEventListener("resize", redraw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    redraw();
  }

  return { show, toggle, zoom, state, color, drawn };
})();
