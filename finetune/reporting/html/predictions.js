"use strict";

const ON_A_PAGE = 50;
const WHICH = {
  all: () => true,
  wrong: (card) => !card.right,
  right: (card) => card.right,
  unstopped: (card) => !card.stopped,
};
const {cards, images} = JSON.parse(document.getElementById("data").textContent);
const controls = document.getElementById("controls");
const template = document.getElementById("card").content.firstElementChild;
const texts = new Map(cards.map((card) => [card, searched(card)]));
let found = cards;
let page = 0;

function searched(card) {
  return [card.question, card.answer, ...card.references.map(([text]) => text)].join("\n").toLowerCase();
}

function make(name, text, className = "") {
  return Object.assign(document.createElement(name), {textContent: text, className});
}

function picture(image) {
  if (typeof image === "string") return make("p", image, "missing");
  return Object.assign(document.createElement("img"), {src: images[image], alt: "image of the question"});
}

function reference([text, times]) {
  const shown = make("span", text, "reference");
  if (times > 1) shown.append(" ", make("small", `× ${times}`));
  return shown;
}

function marks(card) {
  const shown = [make("span", card.right ? "✓ right" : "✗ wrong", "verdict")];
  if (!card.stopped) shown.push(make("span", "cut off at the length limit", "warning"));
  for (const [name, score] of card.scores) shown.push(make("span", `${name} ${score}`));
  return [...shown, make("span", `line ${card.number}`, "muted")];
}

function draw(card) {
  const shown = template.cloneNode(true);
  shown.classList.add(card.right ? "right" : "wrong");
  const part = (name) => shown.querySelector(name);
  part(".pictures").append(...card.images.map(picture));
  part(".pictures").hidden = card.images.length === 0;
  part(".question").textContent = card.question;
  part(".answer").textContent = card.answer || "(nothing)";
  part(".references").append(...card.references.map(reference));
  part(".marks").append(...marks(card));
  return shown;
}

/** Show a page of the cards that were found, and its range. */
function turn(to) {
  const pages = Math.max(1, Math.ceil(found.length / ON_A_PAGE));
  page = Math.max(0, Math.min(to, pages - 1));
  const first = page * ON_A_PAGE;
  const shown = found.slice(first, first + ON_A_PAGE);
  document.getElementById("cards").replaceChildren(...shown.map(draw));
  document.getElementById("none").hidden = shown.length > 0;
  document.getElementById("range").textContent = shown.length ? `${first + 1}–${first + shown.length} of ${found.length.toLocaleString("en")}` : "0";
  for (const button of document.querySelectorAll("[data-turn]")) {
    button.disabled = !(page + Number(button.dataset.turn) in Array.from({length: pages}));
  }
}

function find() {
  const words = document.getElementById("search").value.toLowerCase();
  const fits = WHICH[new FormData(controls).get("which")];
  found = cards.filter((card) => fits(card) && texts.get(card).includes(words));
  turn(0);
}

for (const count of document.querySelectorAll("[data-count]")) {
  count.textContent = cards.filter(WHICH[count.dataset.count]).length.toLocaleString("en");
}
controls.addEventListener("input", find);
controls.addEventListener("submit", (event) => event.preventDefault());
for (const button of document.querySelectorAll("[data-turn]")) {
  button.addEventListener("click", () => {
    turn(page + Number(button.dataset.turn));
    controls.scrollIntoView();
  });
}
find();
