"use strict";
// The data hold a conversation's layout; everything else is worked out here, as flexreason does it:
// token q sees kv where kv <= q < until[kv], and a sample is the path from the root to its last token.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const KINDS = ["prompt", "reasoning", "response"];
const PROMPT = 1, REASONING = 2, CONTEXT = 4;
const TOGETHER = 240; // tokens of a block: what is made into elements at once, when it comes near
const number = (n) => n.toLocaleString("en");

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- a conversation's tokens

class Tokens {
  constructor(given) {
    Object.assign(this, given);
    const n = this.texts.length;
    this.until = new Int32Array(n); this.position = new Int32Array(n); this.turn = new Int32Array(n); this.role = new Int32Array(n);
    for (const [start, end, position, until, turn, role] of this.stretches)
      for (let i = start; i < end; i++) {
        this.until[i] = until; this.position[i] = position + i - start; this.turn[i] = turn; this.role[i] = role;
      }
    this.added = new Set(this.added);
    this.targets = new Map(); this.predictors = new Map(); // index -> [[index, turn], ...]
    this.paths = this.turns.map((turn) => this.pathTo(turn.last));
    this.paths.forEach((runs, at) => {
      const turn = this.turns[at];
      for (const [from, to] of turn.trained)
        for (let n = from; n < to; n++) {
          const here = this.at(runs, n), before = this.at(runs, n - 1);
          if (!this.targets.has(before)) this.targets.set(before, []);
          this.targets.get(before).push([here, at]);
          if (!this.predictors.has(here)) this.predictors.set(here, []);
          this.predictors.get(here).push([before, at]);
        }
    });
  }

  get length() { return this.texts.length; }
  sees(q, kv) { return kv <= q && q < this.until[kv]; }

  // The path to a token as runs [start, end, tokens before it].
  pathTo(last) {
    const runs = []; let n = 0;
    for (const [start, end, , until] of this.stretches) {
      if (start > last || until <= last) continue;
      const stop = Math.min(end, last + 1), behind = runs[runs.length - 1];
      if (behind && behind[1] === start) behind[1] = stop; else runs.push([start, stop, n]);
      n += stop - start;
    }
    return runs;
  }

  at(runs, n) { // the index of a path's n-th token
    let low = 0, high = runs.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (runs[middle][2] <= n) low = middle; else high = middle - 1; }
    return runs[low][0] + n - runs[low][2];
  }

  place(runs, index) { // and back: -1 where it is not on the path
    const run = runs.find(([start, end]) => start <= index && index < end);
    return run ? run[2] + index - run[0] : -1;
  }

  text(index, turn) {
    const last = turn >= 0 ? this.turns[turn].last : -1;
    for (const [fork, texts] of this.rereads)
      if (fork <= last && last < this.until[fork] && index in texts) return texts[index];
    return this.texts[index];
  }

  kind(index, generated) {
    const role = this.role[index];
    if (generated) return role & REASONING ? 1 : 2;
    return role & CONTEXT ? 2 : role & REASONING && !(role & PROMPT) ? 1 : 0;
  }

  // A sample's tokens in parts of one kind: {start, end} of the path, runs of indices.
  parts(at, from = 0, to = Infinity) {
    const { prompt, shared, trained } = this.turns[at], parts = [];
    for (const [start, end, before] of this.paths[at])
      for (let index = start + Math.max(0, from - before); index < end; index++) {
        const n = before + index - start;
        if (n >= to) break;
        const kind = this.kind(index, n >= prompt), isTrained = trained.some(([a, b]) => a <= n && n < b), isShared = n < shared;
        const last = parts[parts.length - 1];
        if (last && last.kind === kind && last.trained === isTrained && last.shared === isShared) {
          last.end = n + 1;
          const run = last.runs[last.runs.length - 1];
          if (run[1] === index) run[1]++; else last.runs.push([index, index + 1]);
        } else parts.push({ start: n, end: n + 1, kind, trained: isTrained, shared: isShared, runs: [[index, index + 1]] });
      }
    return parts;
  }
}

// --- blocks of text: plain at first, a span a token once they come near

let tokens, here = -1, inTurn = -1, pinned = false;
const near = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) { near.add(target); spell(target); light(target); } else near.delete(target);
  }
}, { rootMargin: "250px 0px" });

function blocks(runs, turn, into) {
  let block = null, left = 0;
  for (const [start, end] of runs)
    for (let at = start; at < end; ) {
      if (!left) {
        block = element("div", "block"); block.runs = []; block.turn = turn; left = TOGETHER;
        into.append(block);
      }
      const n = Math.min(left, end - at);
      block.runs.push([at, at + n]); at += n; left -= n;
    }
  for (const block of into.querySelectorAll(":scope > .block")) {
    const text = block.runs.map(([start, end]) => range(start, end).map((i) => tokens.text(i, turn)).join("")).join("");
    block.textContent = text;
    block.style.setProperty("--high", `${Math.ceil(1.4 * (text.length / 62 + text.split("\n").length))}rem`);
    observer.observe(block);
  }
}

const range = (start, end) => Array.from({ length: end - start }, (_, n) => start + n);

function spell(block) {
  if (block.spans) return;
  block.spans = [];
  const all = document.createDocumentFragment();
  for (const [start, end] of block.runs)
    for (let index = start; index < end; index++) {
      const lines = tokens.text(index, block.turn).split("\n"), span = element("span", "", lines[0]);
      for (const line of lines.slice(1)) span.append(element("i", "break"), `\n${line}`);
      span.base = tokens.added.has(index) ? "added" : "";
      span.className = span.base;
      span.dataset.i = index;
      block.spans.push(span);
      all.append(span);
    }
  block.replaceChildren(all);
}

function light(block) {
  if (!block.spans) return;
  const targets = new Set((tokens.targets.get(here) || []).map(([index]) => index));
  const predictors = new Set((tokens.predictors.get(here) || []).map(([index]) => index));
  let lit = false;
  for (const span of block.spans) {
    const index = Number(span.dataset.i);
    let name = "";
    if (here >= 0) {
      if (index === here) name = " here sees seen";
      else if (tokens.sees(here, index)) name = " sees";
      else if (tokens.sees(index, here)) name = " seen";
      if (targets.has(index)) name += " target";
      if (predictors.has(index)) name += " predictor";
    }
    lit ||= name !== "";
    if (span.className !== span.base + name) span.className = span.base + name;
  }
  block.classList.toggle("lit", lit);
}

function choose(index, turn = -1) {
  if (index === here && turn === inTurn) return;
  here = index; inTurn = turn;
  for (const block of near) light(block);
  inspect();
  drawMask();
}

function inspect() {
  const box = $("inspector");
  box.replaceChildren();
  const say = (text, name = "", mark = "") => {
    const span = element("span", name, text);
    if (mark) span.style.setProperty("--mark", `var(--${mark})`);
    box.append(span);
  };
  if (here < 0) {
    say("Point at a token, tap it, or press → : what it sees and who sees it lights up.");
    const keys = element("span", "keys");
    keys.innerHTML = "<kbd>←</kbd> <kbd>→</kbd> token &nbsp; <kbd>↑</kbd> <kbd>↓</kbd> turn &nbsp; <kbd>Esc</kbd> nothing";
    box.append(keys);
    return;
  }
  const quote = (index) => `“${(tokens.text(index, inTurn) || "(goes on)").replaceAll("\n", "↵")}”`;
  box.append(element("code", "", (tokens.text(here, inTurn) || "(goes on)").replaceAll("\n", "↵")));
  const roles = [[1, "prompt"], [2, "reasoning"], [4, "context"], [8, "response"]].filter(([flag]) => tokens.role[here] & flag);
  say(`id ${tokens.ids[here]} · index ${number(here)} · position ${number(tokens.position[here])} · turn ${tokens.turn[here]} · ${roles.map(([, name]) => name).join(" and ")}`);
  say(`sees ${number(tokens.position[here] + 1)}, itself included`, "dot", "sees");
  say(`seen by ${number(tokens.until[here] - here)}`, "dot", "seen");
  const each = (pairs) => pairs.map(([index, turn]) => `${quote(index)} at ${number(index)} (turn ${turn})`).join(", ");
  const targets = tokens.targets.get(here), predictors = tokens.predictors.get(here);
  say(targets ? `predicts ${each(targets)}` : "predicts nothing", "dot", "target");
  say(predictors ? `is predicted by ${each(predictors)}` : "is not trained", "dot", "predictor");
}
