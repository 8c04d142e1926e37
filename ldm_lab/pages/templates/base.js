"use strict";

/** The value that the page brought along under this name. */
const data = (name) => JSON.parse(document.getElementById(`data-${name}`).textContent);

/** A new element with attributes and children; texts stay texts. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Have the browser save a text as a file. */
function download(name, text, type = "application/json") {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

/** What is kept in this browser between visits; where that is not allowed, as long as the page is open. */
const kept = {
  memory: new Map(),
  get(key) {
    try { return localStorage.getItem(key); } catch { return this.memory.get(key) ?? null; }
  },
  set(key, value) {
    this.memory.set(key, value);
    try { localStorage.setItem(key, value); } catch { /* private windows, some browsers for files */ }
  },
};
