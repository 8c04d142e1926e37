/**
 * A box that filters: <input type="search" data-filters="SELECTOR"> leaves those shown whose data-words have all words
 * that are typed; an element with data-count says how many. Every change fires the event "filtered" on the document.
 */
document.querySelectorAll("input[data-filters]").forEach((box) => {
  const all = [...document.querySelectorAll(box.dataset.filters)];
  const count = document.querySelector("[data-count]");
  function filter() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const one of all) {
      const text = (one.dataset.words ?? "").toLowerCase();
      one.hidden = !words.every((word) => text.includes(word));
      shown += one.hidden ? 0 : 1;
    }
    if (count) count.textContent = words.length ? `${shown} of ${all.length}` : `${all.length}`;
    document.dispatchEvent(new Event("filtered"));
  }
  box.addEventListener("input", filter);
  filter();  // browsers keep what was typed when a page is loaded again
});
