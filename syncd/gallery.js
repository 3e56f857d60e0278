"use strict";
// The gallery of one patient. It asks nobody: what it shows lies in this page's JSON and in the files beside the page.
// Texts of the practice come into the page as text only, never as markup.

const part = (id) => document.getElementById(id);
const content = JSON.parse(part("content").textContent);
const items = new Map(content.items.map((item) => [item.id, item]));

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter(Boolean));
  return element;
}

// --- cards, by year

const cards = []; // {item, images, element, words}
const isCard = (item) => !items.has(item.mount);

function tile(item) {
  const source = item.thumbnail || (item.show === "image" ? item.file : "");
  const badge = item.show !== "image" && make("span", "badge", item.format);
  if (!source) return make("span", "tile paper", badge || item.format);
  const picture = make("img");
  picture.loading = "lazy";
  picture.alt = "";
  picture.onerror = () => picture.replaceWith(item.format);
  picture.src = source;
  return make("span", "tile", picture, badge);
}

function opener(item, ...children) {
  const button = make("button", "open", ...children);
  button.type = "button";
  button.tabIndex = -1; // the arrow keys go from one to the next
  button.dataset.id = item.id;
  button.title = item.title;
  return button;
}

function caption(item, images) {
  const said = [item.date, item.category, item.teeth && `#${item.teeth}`, images && `${images} images`];
  const line = make("bdi", "line", said.filter(Boolean).join(" · "));
  const gone = item.gone && make("span", "gone", "no longer in Open Dental");
  return make("span", "caption", make("bdi", "title", item.title), line, gone);
}

function card(item, images) {
  const element = make("article", images.length ? "card mount" : "card");
  element.append(opener(item, tile(item), caption(item, images.length)));
  if (images.length) element.append(make("div", "strip", ...images.map((image) => opener(image, tile(image)))));
  const told = [item, ...images].flatMap((each) => [each.id, each.title, each.date, each.category, each.teeth, each.type]);
  cards.push({ item, images, element, words: told.join(" ").toLowerCase() });
  return element;
}

function groups(members, key) {
  const found = new Map();
  for (const member of members) found.has(key(member)) ? found.get(key(member)).push(member) : found.set(key(member), [member]);
  return found;
}

function showCards() {
  const inside = groups(content.items.filter((item) => !isCard(item)), (item) => item.mount);
  for (const [year, members] of groups(content.items.filter(isCard), (item) => item.date.slice(0, 4) || "No date")) {
    const grid = make("div", "grid", ...members.map((item) => card(item, inside.get(item.id) || [])));
    part("years").append(make("section", "", make("h2", "", year), grid));
  }
}

// --- header and filters

let category = null; // null: all

function showHeader() {
  part("name").textContent = content.patient.name;
  part("facts").append(...content.patient.facts.map((fact) => make("span", "", fact)));
  const lacking = content.lacking;
  part("lacking").hidden = !lacking.length;
  const reasons = groups(lacking, (each) => each.why);
  const counts = [...reasons].map(([why, members]) => `${members.length} ${why}`);
  part("lacking").firstElementChild.textContent = `Not shown here: ${counts.join("; ")}`;
  for (const each of lacking) {
    const words = [each.id, each.date, each.text, each.why].filter(Boolean).join(" · ");
    part("lacking").lastElementChild.append(make("li", "", make("bdi", "", words)));
  }
}

function showCategories() {
  const named = groups(cards, (each) => each.item.category || "Without category");
  const names = [...named.keys()].sort((one, other) => one.localeCompare(other));
  for (const name of [null, ...names]) {
    const count = make("small", "", ` ${name === null ? cards.length : named.get(name).length}`);
    const button = make("button", "", make("bdi", "", name === null ? "All" : name), count);
    button.type = "button";
    button.onclick = () => {
      category = name;
      filter();
    };
    button.dataset.category = name === null ? "" : name;
    part("categories").append(button);
  }
}

function filter() {
  const words = part("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const from = part("from").value, to = part("to").value;
  let count = 0;
  for (const { item, element, words: told } of cards) {
    const fits = (category === null || (item.category || "Without category") === category)
      && (!from || item.date >= from) && (!to || (item.date && item.date <= to))
      && words.every((word) => told.includes(word));
    element.hidden = !fits;
    count += fits;
  }
  for (const section of part("years").children) section.hidden = !section.querySelector("article:not([hidden])");
  for (const button of part("categories").children) {
    const pressed = category === null ? button === part("categories").firstElementChild : button.dataset.category === category;
    button.setAttribute("aria-pressed", String(pressed));
  }
  part("count").textContent = count === cards.length ? `${count.toLocaleString()} documents` : `${count.toLocaleString()} of ${cards.length.toLocaleString()}`;
}

// --- the arrow keys among the cards

const openers = () => [...document.querySelectorAll("#years section:not([hidden]) article:not([hidden]) .open")];

function walk(event) {
  const here = event.target.closest(".open");
  const all = openers(), at = all.indexOf(here), box = here.getBoundingClientRect();
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
  let next = all[at + step];
  if (event.key === "Home" || event.key === "End") next = all[event.key === "Home" ? 0 : all.length - 1];
  else if (event.key === "ArrowUp" || event.key === "ArrowDown") next = inNextRow(all, at, step, box) || next;
  else if (!step) return;
  event.preventDefault();
  if (next) focusOn(next);
}

function inNextRow(all, at, step, box) {
  const middle = (each) => each.left + each.width / 2;
  let row = null, best = null;
  for (let n = at + step; all[n]; n += step) {
    const other = all[n].getBoundingClientRect();
    if (Math.abs(other.top - box.top) < 8) continue;
    if (row === null) row = other.top;
    if (Math.abs(other.top - row) >= 8) break;
    const distance = Math.abs(middle(other) - middle(box));
    if (!best || distance < best.distance) best = { distance, element: all[n] };
  }
  return best && best.element;
}

function focusOn(element) {
  for (const other of document.querySelectorAll('#years [tabindex="0"]')) other.tabIndex = -1;
  element.tabIndex = 0;
  element.focus();
}

// --- the viewer

const viewer = part("viewer"), stage = part("stage");
let row = [], place = 0; // what the viewer goes through, and where it is
let picture = null;
const look = {};

function view(id) {
  row = cards.filter((each) => !each.element.hidden).flatMap((each) => [each.item, ...each.images]);
  place = row.findIndex((item) => item.id === id);
  document.body.classList.add("viewing");
  if (!viewer.open) viewer.showModal();
  showItem();
}

function step(by) {
  if (row[place + by]) {
    place += by;
    showItem();
  }
}

function showItem() {
  const item = row[place];
  part("title").textContent = item.title;
  part("position").textContent = `${place + 1} of ${row.length}`;
  part("file").href = item.file;
  part("previous").disabled = !row[place - 1];
  part("next").disabled = !row[place + 1];
  viewer.dataset.show = item.show;
  picture = null;
  stage.replaceChildren(shown(item));
  showDetails(item);
  showStrip(item);
}

function shown(item) {
  if (item.show === "image") {
    picture = make("img");
    picture.alt = item.title;
    picture.draggable = false;
    picture.onload = reset;
    picture.onerror = () => stage.replaceChildren(elsewhere(item, "This picture cannot be shown here."));
    picture.src = item.file;
    return picture;
  }
  if (item.show === "video") {
    const video = make("video");
    video.controls = true;
    video.src = item.file;
    return video;
  }
  if (!item.show) return elsewhere(item, `Browsers cannot show ${item.format || "such"} files.`);
  const frame = make("iframe");
  frame.title = item.title;
  frame.src = item.file;
  return frame;
}

function elsewhere(item, why) {
  const link = make("a", "button", "Open the file");
  link.href = item.file;
  link.target = "_blank";
  const preview = make("img");
  preview.src = item.thumbnail;
  preview.alt = "";
  const note = item.thumbnail && make("p", "", "Above is the small picture that Open Dental made of it; the file itself is whole.");
  const where = make("p", "", `Its program opens it with a double click, in the folder "${item.folder}" beside this page: `, make("bdi", "", item.name));
  return make("div", "elsewhere", item.thumbnail && preview, make("p", "", why), note, link, where);
}

function showDetails(item) {
  const told = {
    Date: item.date, Category: item.category, Teeth: item.teeth, Type: item.type, "Open Dental": item.gone ? "no longer there" : "",
    Number: item.id, Mount: items.has(item.mount) ? items.get(item.mount).title : "", Version: item.version, Archived: item.archived,
    File: item.name, Size: item.size, "SHA-256": item.sha256,
  };
  const lines = Object.entries(told).filter(([, value]) => value);
  part("details").replaceChildren(...lines.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", make("bdi", "", String(value)))]));
}

function showStrip(item) {
  const mount = items.get(item.mount) || item;
  const members = row.filter((each) => each === mount || each.mount === mount.id);
  part("strip").hidden = members.length < 2;
  part("strip").replaceChildren(...members.map((each) => {
    const button = opener(each, tile(each));
    button.tabIndex = 0;
    if (each === item) button.setAttribute("aria-current", "true");
    return button;
  }));
}

// --- how a picture is looked at

function draw() {
  if (!picture) return;
  picture.style.transform = `translate(-50%, -50%) translate(${look.x}px, ${look.y}px) rotate(${look.turn}deg) scale(${look.scale})`;
  picture.style.filter = `brightness(${look.brightness}%) contrast(${look.contrast}%) invert(${look.inverted ? 1 : 0})`;
  picture.classList.toggle("pixels", look.scale > 8);
  part("zoom").textContent = `${Math.round(look.scale * 100)} %`;
  part("brightness").value = look.brightness;
  part("contrast").value = look.contrast;
  part("invert").setAttribute("aria-pressed", String(look.inverted));
}

function fit() {
  if (!picture) return;
  const { naturalWidth: width, naturalHeight: height } = picture, sideways = look.turn % 180 !== 0;
  const scale = Math.min(stage.clientWidth / (sideways ? height : width), stage.clientHeight / (sideways ? width : height));
  Object.assign(look, { scale: Math.min(scale, 8), x: 0, y: 0 });
  draw();
}

function reset() {
  Object.assign(look, { turn: 0, brightness: 100, contrast: 100, inverted: false });
  fit();
}

function zoom(factor, x = 0, y = 0) {
  const scale = Math.min(40, Math.max(0.02, look.scale * factor));
  Object.assign(look, { x: x - (x - look.x) * (scale / look.scale), y: y - (y - look.y) * (scale / look.scale), scale });
  draw();
}

function change(changed) {
  Object.assign(look, changed);
  draw();
}

const turn = () => {
  look.turn = (look.turn + 90) % 360;
  fit();
};
const commands = {
  previous: () => step(-1), next: () => step(1), smaller: () => zoom(1 / 1.25), larger: () => zoom(1.25), fit, turn, reset,
  whole: () => zoom(1 / look.scale), invert: () => change({ inverted: !look.inverted }), sheet: () => print(), close: () => viewer.close(),
};
const keys = {
  ArrowLeft: "previous", ArrowRight: "next", "+": "larger", "=": "larger", "-": "smaller", 0: "fit", 1: "whole", i: "invert", t: "turn", r: "reset",
};

function listen() {
  for (const [id, command] of Object.entries(commands)) part(id).onclick = command;
  part("brightness").oninput = (event) => change({ brightness: event.target.value });
  part("contrast").oninput = (event) => change({ contrast: event.target.value });
  viewer.addEventListener("keydown", (event) => {
    const name = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!name || event.target.type === "range" || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    commands[name]();
  });
  viewer.addEventListener("close", () => {
    document.body.classList.remove("viewing");
    stage.replaceChildren();
    const item = row[place];
    focusOn(document.querySelector(`#years [data-id="${CSS.escape(item.id)}"]`));
  });
  stage.addEventListener("wheel", (event) => {
    if (!picture) return;
    event.preventDefault();
    const box = stage.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => picture && stage.setPointerCapture(event.pointerId));
  stage.addEventListener("pointermove", (event) => {
    if (picture && stage.hasPointerCapture(event.pointerId)) change({ x: look.x + event.movementX, y: look.y + event.movementY });
  });
  stage.addEventListener("dblclick", fit);
  addEventListener("resize", fit);
  for (const place of [part("years"), part("strip")]) {
    place.addEventListener("click", (event) => event.target.closest(".open") && view(event.target.closest(".open").dataset.id));
  }
  part("years").addEventListener("keydown", (event) => event.target.closest(".open") && walk(event));
  part("filters").addEventListener("input", filter);
  part("filters").addEventListener("submit", (event) => event.preventDefault());
  part("filters").addEventListener("reset", () => {
    category = null;
    setTimeout(filter);
  });
  part("print").onclick = () => print();
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !viewer.open && event.target.tagName !== "INPUT") {
      event.preventDefault();
      part("text").focus();
    }
  });
}

showHeader();
showCards();
showCategories();
filter();
listen();
if (openers()[0]) openers()[0].tabIndex = 0;
