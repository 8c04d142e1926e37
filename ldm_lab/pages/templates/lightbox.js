/**
 * Images that enlarge: every <a class="enlarge" href="IMAGE">. What is told with one is its data-caption, or what
 * `lightbox.caption` makes of it. Left and right go through all that are shown, up and down stay in the column, by what
 * `lightbox.column` says; a swipe does as left and right.
 */
const lightbox = (() => {
  const image = element("img", { alt: "" });
  const caption = element("p", { class: "caption" });
  const back = element("button", { type: "button", "aria-label": "previous image" }, "‹");
  const on = element("button", { type: "button", "aria-label": "next image" }, "›");
  const close = element("button", { type: "button", "aria-label": "close" }, "×");
  const foot = element("div", { class: "foot" }, back, caption, on, close);
  const box = element("dialog", { class: "lightbox", "aria-label": "enlarged image" }, image, foot);
  document.body.append(box);
  let shown = null;

  const isShown = (link) => link.checkVisibility ? link.checkVisibility() : link.getClientRects().length > 0;

  /** The next link that is shown on this side of one, of those that fit; undefined behind the last. */
  function beside(link, by, fits = () => true) {
    const all = [...document.querySelectorAll("a.enlarge")];
    let i = all.indexOf(link) + by;
    while (all[i] && !(fits(all[i]) && isShown(all[i]))) i += by;
    return all[i];
  }

  function show(link) {
    if (!link) return;
    shown = link;
    image.src = link.href;
    image.alt = caption.textContent = made.caption(link);
    back.disabled = !beside(link, -1);
    on.disabled = !beside(link, 1);
    if (!box.open) box.showModal();
  }

  const step = (by) => show(beside(shown, by));

  function stepInColumn(by) {
    const column = made.column(shown);
    if (column !== undefined) show(beside(shown, by, (link) => made.column(link) === column));
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.enlarge");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(link);
  });
  const moves = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => stepInColumn(-1), ArrowDown: () => stepInColumn(1),
  };
  document.addEventListener("keydown", (event) => {  // not of the box: a button that is disabled loses the focus
    if (!box.open || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moves[event.key]();
  });
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));

  // Leaving is done at once, not at the box's event "close": that comes later, when another image may be shown already.
  function leave() {
    if (!box.open) return;
    box.close();
    image.removeAttribute("src");
    shown?.focus();
  }

  close.addEventListener("click", leave);
  box.addEventListener("click", (event) => { if (event.target === box) leave(); });
  box.addEventListener("cancel", (event) => { event.preventDefault(); leave(); });

  let start = null;
  box.addEventListener("touchstart", (event) => {
    start = event.touches.length === 1 ? event.touches[0] : null;
  }, { passive: true });
  box.addEventListener("touchend", (event) => {
    if (!start) return;
    const x = event.changedTouches[0].clientX - start.clientX, y = event.changedTouches[0].clientY - start.clientY;
    start = null;
    if (Math.abs(x) > 40 && Math.abs(x) > 2 * Math.abs(y)) step(x < 0 ? 1 : -1);
  });
  const made = {
    box, show, leave, link: () => shown, caption: (link) => link.dataset.caption ?? "", column: (link) => link.dataset.column,
  };
  return made;
})();
