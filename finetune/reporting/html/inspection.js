"use strict";

const {images} = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
let anchor = tip;

for (const image of document.querySelectorAll("img[data-image]")) image.src = images[image.dataset.image];

/** Mark what belongs to the token, image or bar that is pointed at, or nothing. */
function pointAt(target) {
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  tip.hidden = true;
  const token = target.closest(".tokens .token");
  const image = target.closest(".image");
  const bar = target.closest("[data-tip]");
  if (token) pointAtToken(token);
  else if (image) pointAtImage(image);
  else if (bar) showTip(bar, [bar.dataset.tip]);
}

function pointAtToken(token) {
  const article = token.closest("article");
  const sees = token.closest(".run").dataset.sees;
  const position = [...article.querySelectorAll(".tokens .token")].indexOf(token);
  const label = token.classList.contains("supervised") ? `label ${token.dataset.id}` : "not trained on";
  const seen = sees === undefined ? "sees no image" : `sees image ${Number(sees) + 1}`;
  token.classList.add("lit");
  if (sees !== undefined) lightImage(article.querySelector(`.image[data-number="${sees}"]`));
  showTip(token, [JSON.stringify(token.textContent), `id ${token.dataset.id}`, label, `position ${position}`, seen]);
}

/** Mark an image, and bring it into view among the images of its example, without moving the page. */
function lightImage(image) {
  image.classList.add("lit");
  image.parentElement.scrollTo({left: image.offsetLeft - 8, top: image.offsetTop - 8});
}

function pointAtImage(image) {
  image.classList.add("lit");
  for (const run of image.closest("article").querySelectorAll(`.run[data-sees="${image.dataset.number}"]`)) {
    run.classList.add("lit", [...image.classList].find((name) => /^c\d$/.test(name)));
  }
}

function showTip(element, lines) {
  tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("span"), {textContent: line})));
  tip.hidden = false;
  anchor = element;
  placeTip();
}

/** Below its anchor; above it where the window ends. */
function placeTip() {
  const place = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
  const below = place.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? place.bottom + 6 : place.top - tip.offsetHeight - 6}px`;
}

for (const event of ["pointerover", "focusin", "click"]) {
  document.addEventListener(event, ({target}) => pointAt(target));
}
document.documentElement.addEventListener("pointerleave", () => pointAt(document.body));
document.addEventListener("scroll", placeTip, {passive: true});

/** Arrow keys go from token to token; Tab goes from example to image to example. */
function nextToken(box, key) {
  const tokens = [...box.querySelectorAll(".token")];
  const now = tokens.indexOf(document.activeElement);
  const steps = {ArrowRight: now + 1, ArrowLeft: now < 0 ? 0 : now - 1, Home: 0, End: tokens.length - 1};
  return key in steps ? tokens[Math.max(0, Math.min(steps[key], tokens.length - 1))] : undefined;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") pointAt(document.body);
  const box = event.target.closest(".tokens");
  const token = box && nextToken(box, event.key);
  if (!token) return;
  event.preventDefault();
  token.tabIndex = -1;
  token.focus();
});

/** Show what belongs to the chosen source. */
function filter(source) {
  for (const element of document.querySelectorAll("article[data-source], .rejected[data-source]")) {
    element.hidden = source !== "" && element.dataset.source !== source;
  }
  for (const row of document.querySelectorAll("tr[data-row]")) row.classList.toggle("chosen", row.dataset.row === source);
  const own = document.querySelector(`.chart[data-source="${source}"]`) ? source : "";
  for (const chart of document.querySelectorAll(".chart")) chart.hidden = chart.dataset.source !== own;
  for (const section of document.querySelectorAll(".dialogues")) {
    const shown = section.querySelectorAll("article:not([hidden])").length;
    section.querySelector(".count").textContent = shown;
    section.querySelector(".none").hidden = shown > 0;
  }
}

document.getElementById("source").addEventListener("change", ({target}) => filter(target.value));
document.getElementById("borders").addEventListener("change", ({target}) => {
  document.body.classList.toggle("borders", target.checked);
});
addEventListener("beforeprint", () => {
  document.querySelector(".recipe").open = true;
});
