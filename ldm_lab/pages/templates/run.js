charts.show(document.getElementById("curves"));

/** Grids over time: a slider through all steps of each kind. */
for (const figure of document.querySelectorAll("figure[data-series]")) {
  const { name, steps, addresses } = data("pictures").series[+figure.dataset.series];
  const part = (which) => figure.querySelector(`[data-part=${which}]`);
  const slider = part("slider"), image = part("image"), link = part("link");

  const show = () => {
    const at = +slider.value, said = `step ${steps[at].toLocaleString("en-US")}`;
    image.src = link.href = addresses[at];
    image.alt = link.dataset.caption = `${name}, ${said}`;
    part("step").textContent = `${said}, ${at + 1} of ${steps.length}`;
    part("back").disabled = at === 0;
    part("on").disabled = at === steps.length - 1;
    for (const near of [at - 1, at + 1]) if (near in addresses) new Image().src = addresses[near];
  };
  const step = (by) => { slider.value = +slider.value + by; show(); };
  slider.addEventListener("input", show);
  part("back").addEventListener("click", () => step(-1));
  part("on").addEventListener("click", () => step(1));
  show();
}
