// Which conversation and view are open, pointer and keys, and what is to be looked at.
let shown = "samples";

// --- what is looked at

let current = 0, conversation = -1;

function open(at) {
  conversation = at;
  observer.disconnect(); near.clear();
  here = inTurn = -1; pinned = false; current = 0;
  tokens = new Tokens(data.conversations[at]);
  $("conversations").value = at;
  const about = $("about");
  about.replaceChildren(element("h2", "", tokens.where), element("p", "sizes", tokens.sizes));
  if (!tokens.refused && tokens.turns.length > 1) about.append(turnMap());
  drawSamples(); drawTree(); drawWays(); inspect(); drawMask();
  for (const tab of document.querySelectorAll("#tabs button")) tab.hidden = Boolean(tokens.refused) && tab.dataset.view !== "samples";
  window.scrollTo(0, 0);
}

function turnMap() {
  const map = element("div", "map");
  tokens.turns.forEach((turn, at) => {
    const button = element("button", tokens.remarks.some((remark) => remark.turn === at) ? "warn" : "", String(at)), bar = element("i");
    button.type = "button";
    for (const part of tokens.parts(at, turn.shared)) {
      const piece = element("b", KINDS[part.kind]);
      piece.style.flex = `${part.end - part.start} 1 0`;
      bar.append(piece);
    }
    button.append(bar);
    button.setAttribute("aria-label", `turn ${at}`);
    button.onclick = () => toTurn(at);
    map.append(button);
  });
  return map;
}

function toTurn(at, scroll = true) {
  current = at;
  document.querySelectorAll(".map button").forEach((button, n) => button.setAttribute("aria-current", n === at));
  drawWays();
  if (scroll) { if (shown !== "ways") show("samples"); $(`turn-${at}`).scrollIntoView({ block: "start" }); }
}

function show(view) {
  shown = view;
  const wide = matchMedia("(min-width: 801px)").matches, beside = wide && view === "samples" ? lastBeside : view;
  if (view !== "samples") lastBeside = view;
  for (const box of document.querySelectorAll(".view")) box.classList.toggle("shown", box.id === (wide ? beside : view));
  for (const tab of document.querySelectorAll("#tabs button")) tab.setAttribute("aria-selected", tab.dataset.view === (wide ? beside : view));
  drawMask();
}
let lastBeside = "tree";

// --- pointer and keys

document.addEventListener("pointerover", (event) => {
  const span = event.target.closest(".block span");
  if (span && !pinned && event.pointerType === "mouse") choose(Number(span.dataset.i), span.parentNode.turn);
});
document.addEventListener("click", (event) => {
  const span = event.target.closest(".block span");
  if (!span) return;
  const again = pinned && Number(span.dataset.i) === here;
  pinned = !again;
  choose(again ? -1 : Number(span.dataset.i), span.parentNode.turn);
  if (!again) reveal(span.closest("#samples") ? "tree" : "samples");
});

// Bring the token that is looked at into sight, in the samples or in the tree.
function reveal(view) {
  if (here < 0 || !$(view).offsetParent) return;
  const holds = (block) => block.runs.some(([start, end]) => start <= here && here < end) && (view === "tree" || inTurn < 0 || block.turn === inTurn);
  if (view === "samples" && inTurn >= 0 && tokens.place(tokens.paths[inTurn], here) < tokens.turns[inTurn].shared) {
    const fold = $(`turn-${inTurn}`).querySelector(".fold");
    if (fold) fold.open();
  }
  const block = [...$(view).querySelectorAll(".block")].find(holds);
  if (!block) return;
  spell(block); near.add(block); light(block);
  block.spans.find((span) => Number(span.dataset.i) === here).scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.target.closest("select, input") || event.ctrlKey || event.metaKey || event.altKey || tokens.refused) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], jump = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.key === "Escape") { pinned = false; return choose(-1); }
  if (!step && !jump) return;
  event.preventDefault();
  pinned = true;
  if (jump || here < 0) {
    const at = here < 0 ? current : Math.min(tokens.turns.length - 1, Math.max(0, Math.max(0, inTurn) + jump));
    toTurn(at, false);
    choose(tokens.at(tokens.paths[at], tokens.turns[at].prompt), at);
  } else if (inTurn >= 0) {
    const runs = tokens.paths[inTurn], last = runs[runs.length - 1];
    const n = Math.min(last[2] + last[1] - last[0] - 1, Math.max(0, tokens.place(runs, here) + step));
    choose(tokens.at(runs, n), inTurn);
  } else choose(Math.min(tokens.length - 1, Math.max(0, here + step)));
  reveal("samples"); reveal("tree");
});

// --- the frame

function remarks() {
  const all = data.conversations.flatMap((one, at) => [
    ...(one.refused ? [{ at, words: `refused, ${one.refused.reason}: ${one.refused.words}`, message: one.refused.message, where: one.refused.where }] : []),
    ...one.remarks.map((remark) => ({ at, ...remark })),
  ]);
  if (!all.length) return;
  const box = $("remarks");
  box.hidden = false;
  box.append(element("b", "", all.length === 1 ? "One thing to look at" : `${number(all.length)} things to look at`));
  for (const remark of all) {
    const button = element("button"), place = [];
    button.type = "button";
    if (data.conversations.length > 1) place.push(data.conversations[remark.at].where.replace(/^.*\//, ""));
    if (remark.where) place.push(remark.where);
    button.append(element("span", "at", place.join(", ") || "here"), element("span", "words", remark.words));
    button.onclick = () => {
      if (conversation !== remark.at) open(remark.at);
      show("samples");
      if (remark.turn !== undefined && remark.turn !== null) return toTurn(remark.turn);
      const card = $(`message-${remark.message}`);
      if (card) card.scrollIntoView({ block: "start" });
    };
    box.append(button);
  }
}

data.conversations.forEach((one, at) => {
  const option = element("option", "", `${one.where.replace(/^.*\//, "")}${one.refused ? " — refused" : one.remarks.length ? " — look" : ""}`);
  option.value = at;
  $("conversations").append(option);
});
$("pick").hidden = data.conversations.length < 2;
$("conversations").onchange = (event) => open(Number(event.target.value));
const turnPage = (by) => open((conversation + by + data.conversations.length) % data.conversations.length);
$("earlier").onclick = () => turnPage(-1);
$("later").onclick = () => turnPage(1);
$("theme").onclick = () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  drawMask();
};
for (const tab of document.querySelectorAll("#tabs button")) tab.onclick = () => show(tab.dataset.view);
addEventListener("resize", () => show(shown));
remarks();
show("samples");
open(0);
