/** What an enlarged picture of a comparison is told with, and its column, as the page shows them. */
lightbox.caption = (link) => {
  const label = link.closest("figure").querySelector(".label").textContent;
  return `${label}: ${link.closest(".row").querySelector("[data-words]").textContent}`;
};
lightbox.column = (link) => [...link.closest(".row").querySelectorAll("figure")].indexOf(link.closest("figure"));

/** Blind mode of a comparison: names hidden, columns shuffled row by row, votes kept, saved and counted. */
(() => {
  const blindButton = document.getElementById("blind");
  if (!blindButton) return;  // a single column, or not all pictures are made
  const it = data("comparison");
  const count = it.columns.length;
  const grid = document.querySelector(".grid");
  const rows = [...grid.querySelectorAll(".row")];
  const [voting, result, seedBox, progress] = ["voting", "result", "seed", "progress"].map((id) => document.getElementById(id));
  const heads = [...grid.querySelectorAll(".head .label")];
  const place = `ldm_lab-votes-${it.id}`;
  const promptOf = (row) => row.querySelector("[data-words]").textContent;
  let blind = false, current = 0;
  // The voter stays the same in this browser, so that of several files the newest counts; votes: row -> { choice: column or null, order }
  let state = { voter: newVoter(), seed: it.seed, votes: {} };

  function newVoter() {
    return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  function restore() {
    try {
      const { voter, seed, votes } = JSON.parse(kept.get(place));
      if (/^[0-9a-f]{32}$/.test(voter)) state.voter = voter;
      const fits = ([row, vote]) => rows[row] && vote && (vote.choice === null || it.columns[vote.choice] !== undefined);
      if (Number.isInteger(seed) && Object.entries(votes).every(fits)) state = { ...state, seed, votes };
    } catch { /* nothing is kept, or not by this page */ }
  }
  const keep = () => kept.set(place, JSON.stringify(state));

  /** Random numbers that depend on a seed and a row alone (mulberry32). */
  function random(seed, row) {
    let a = (Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(row + 1, 0xc2b2ae35)) >>> 0;
    return () => {
      a = (a + 0x6d2b79f5) >>> 0;
      let t = Math.imul(a ^ (a >>> 15), a | 1);
      t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  /** The columns in the order in which a row shows them. */
  function orderOf(row) {
    const order = [...Array(count).keys()], next = random(state.seed, row);
    for (let i = count - 1; i > 0; i--) {
      const j = Math.floor(next() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }

  /** The buttons of a row, made when they are needed first. */
  function buttons(row) {
    if (row.querySelector(".tie")) return;
    for (const figure of row.querySelectorAll("figure")) {
      figure.append(element("button", { type: "button", class: "vote" }));
    }
    row.append(element("button", { type: "button", class: "tie" }, "No preference"));
  }

  /** Show a row's columns in their order, with their names or without. */
  function arrange(row, number) {
    if (blind) buttons(row);
    const order = blind ? orderOf(number) : [...Array(count).keys()];
    const cast = state.votes[number];
    const figures = [...row.querySelectorAll("figure")];
    const wanted = order.map((column) => figures.find((one) => Number(one.dataset.column) === column));
    const tie = row.querySelector(".tie");
    if (wanted.some((figure, i) => figure !== figures[i])) wanted.forEach((figure) => row.insertBefore(figure, tie));
    wanted.forEach((figure, i) => {
      const name = blind ? `${i + 1}` : it.columns[order[i]];
      figure.querySelector(".label").textContent = name;
      const vote = figure.querySelector(".vote");
      if (!vote) return;
      vote.hidden = !blind;
      vote.textContent = name;
      vote.setAttribute("aria-pressed", String(blind && cast !== undefined && cast.choice === order[i]));
    });
    if (tie) {
      tie.hidden = !blind;
      tie.setAttribute("aria-pressed", String(blind && cast?.choice === null));
    }
    row.classList.toggle("current", blind && number === current);
  }

  function tell() {
    seedBox.value = state.seed;
    seedBox.disabled = Object.keys(state.votes).length > 0;  // votes belong to an order
    progress.textContent = `${Object.keys(state.votes).length} of ${rows.length} rows voted`;
  }

  let arranged = false;  // whether rows are no more as they came
  function draw() {
    document.body.classList.toggle("blind", blind);
    blindButton.setAttribute("aria-pressed", String(blind));
    document.querySelector("details.panel").hidden = blind;
    voting.hidden = !blind;
    heads.forEach((head, i) => { head.textContent = blind ? `${i + 1}` : it.columns[i]; });
    if (blind || arranged) rows.forEach(arrange);
    arranged ||= blind;
    tell();
  }

  /** Change the current row; the window follows it. */
  function go(number) {
    rows[current]?.classList.remove("current");
    current = number;
    const row = rows[number];
    row?.classList.toggle("current", blind);
    row?.scrollIntoView({ block: row.offsetHeight > innerHeight - 80 ? "start" : "center" });
  }
  const shown = () => rows.map((row, i) => i).filter((i) => !rows[i].hidden);

  function step(by) {
    const all = shown(), at = all.indexOf(current);
    const next = at < 0 ? all[0] : all[Math.min(Math.max(at + by, 0), all.length - 1)];
    if (next !== undefined) go(next);
  }

  function cast(number, choice) {
    state.votes[number] = { choice, order: orderOf(number) };
    keep();
    lightbox.leave();
    const open = shown().filter((i) => state.votes[i] === undefined);
    const next = open.find((i) => i > number) ?? open[0];
    arrange(rows[number], number);
    tell();
    if (next !== undefined) go(next);
    else if (Object.keys(state.votes).length === rows.length) reveal();
  }

  function reveal() {
    blind = false;
    const wins = it.columns.map((_, column) => Object.values(state.votes).filter((vote) => vote.choice === column).length);
    const decided = wins.reduce((sum, n) => sum + n, 0), ties = Object.keys(state.votes).length - decided;
    const lines = it.columns.map((name, i) => [name, wins[i]]).sort((a, b) => b[1] - a[1]);
    result.querySelector("tbody").replaceChildren(...lines.map(([name, n]) => element("tr", {},
      element("td", {}, name), element("td", { class: "number" }, `${n}`),
      element("td", { class: "number" }, decided ? `${(100 * n / decided).toFixed(0)} %` : "–"))));
    document.getElementById("ties").textContent =
      `${ties} without a preference; ${rows.length - ties - decided} of ${rows.length} rows not voted; order by seed ${state.seed}.`;
    result.hidden = false;
    draw();
    result.scrollIntoView({ block: "start" });
  }

  function save() {
    const votes = Object.entries(state.votes).map(([number, vote]) => ({
      row: Number(number), prompt: promptOf(rows[number]), seed: it.seeds[number], order: vote.order, choice: vote.choice,
    }));
    const now = new Date().toISOString();
    const content = {
      format: "ldm_lab votes", comparison: it.id, title: it.title, columns: it.columns, rows: rows.length,
      voter: state.voter, saved: now, seed: state.seed, votes,
    };
    download(`votes-${it.id}-${now.replace(/\D/g, "").slice(0, 14)}.json`, JSON.stringify(content, null, 1));
  }

  blindButton.addEventListener("click", () => {
    blind = !blind;
    result.hidden = true;
    const open = shown().find((i) => state.votes[i] === undefined);
    current = open ?? shown()[0] ?? 0;
    draw();
    if (blind) go(current);
  });
  document.getElementById("save").addEventListener("click", save);
  document.getElementById("reveal").addEventListener("click", reveal);
  document.getElementById("clear").addEventListener("click", () => {
    if (Object.keys(state.votes).length && !confirm("Clear all votes on this page?")) return;
    state.votes = {};
    keep();
    draw();
  });
  seedBox.addEventListener("change", () => {
    const seed = Number(seedBox.value);
    if (Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32) state.seed = seed;
    keep();
    draw();
  });
  grid.addEventListener("click", (event) => {
    const button = event.target.closest("button.vote, button.tie");
    if (!button) return;
    const number = rows.indexOf(button.closest(".row"));
    cast(number, button.matches(".tie") ? null : Number(button.closest("figure").dataset.column));
  });
  document.addEventListener("keydown", (event) => {
    if (!blind || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    const number = lightbox.box.open ? rows.indexOf(lightbox.link()?.closest(".row")) : current;
    if (/^[0-9]$/.test(event.key) && Number(event.key) <= count && number >= 0 && !rows[number].hidden) {
      event.preventDefault();
      cast(number, event.key === "0" ? null : orderOf(number)[Number(event.key) - 1]);
    } else if (!lightbox.box.open && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      event.preventDefault();
      step(event.key === "ArrowDown" ? 1 : -1);
    }
  });
  document.addEventListener("filtered", () => {
    if (blind && rows[current]?.hidden) step(0);
  });

  restore();
  keep();
  draw();
})();
