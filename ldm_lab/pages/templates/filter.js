/**
 * A box that filters: <input type="search" data-filters="SELECTOR"> leaves those shown whose words, the text of what has
 * data-words in them, have all words that are typed; an element with data-count says how many. Every change fires the event "filtered" on the document.
 */
document.querySelectorAll("input[data-filters]").forEach((box) => {
  const all = [...document.querySelectorAll(box.dataset.filters)];
  const texts = all.map((one) => [...one.querySelectorAll("[data-words]")].map((its) => its.textContent).join(" ").toLowerCase());
  const count = document.querySelector("[data-count]");
  function filter() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    all.forEach((one, i) => {
      const fits = words.every((word) => texts[i].includes(word));
      if (one.hidden === fits) one.hidden = !fits;
      shown += fits ? 1 : 0;
    });
    if (count) count.textContent = words.length ? `${shown} of ${all.length}` : `${all.length}`;
    document.dispatchEvent(new Event("filtered"));
  }
  box.addEventListener("input", filter);
  filter();  // browsers keep what was typed when a page is loaded again
});
