// The samples, the tree as it is stored, and what other ways train on.

// --- the samples

function drawSamples() {
  const box = $("samples");
  box.replaceChildren();
  if (tokens.refused) return drawRefused(box);
  const aside = [...tokens.untrained];
  tokens.turns.forEach((turn, at) => {
    while (aside.length && aside[0].message < turn.message) box.append(untrained(aside.shift()));
    const card = element("article"), head = element("h3", "", `Turn ${at}`);
    card.id = `turn-${at}`;
    const n = tokens.paths[at].reduce((sum, [start, end]) => sum + end - start, 0), nTrained = turn.trained.reduce((sum, [a, b]) => sum + b - a, 0);
    const words = [`${number(turn.prompt)} tokens sent`, `${number(nTrained)} trained`];
    if (turn.message >= 0) words.unshift(`message ${turn.message}`);
    head.append(element("small", "", words.join(" · ")));
    card.append(head);
    for (const remark of tokens.remarks.filter((remark) => remark.turn === at)) card.append(element("p", "warning", remark.words));
    if (turn.shared) card.append(...folded(at, turn.shared));
    for (const part of tokens.parts(at, turn.shared, n)) card.append(partOf(part, at));
    box.append(card);
  });
  for (const message of aside) box.append(untrained(message));
}

function partOf(part, at) {
  const kind = KINDS[part.kind];
  const row = element("div", `part ${kind}${part.trained ? " trained" : ""}${part.shared ? " shared" : ""}`);
  row.append(element("span", "name", kind));
  const box = element("div");
  row.append(box);
  blocks(part.runs, at, box);
  return row;
}

function folded(at, shared) {
  const runs = tokens.paths[at], end = range(Math.max(0, shared - 14), shared).map((n) => tokens.text(tokens.at(runs, n), at)).join("").replaceAll("\n", " ");
  const button = element("button", "fold", `${number(shared)} tokens as in turn ${at - 1}: … ${end}`), box = element("div");
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  button.open = () => {
    if (!box.childNodes.length) for (const part of tokens.parts(at, 0, shared)) box.append(partOf(part, at));
    box.hidden = false;
    button.setAttribute("aria-expanded", "true");
  };
  button.onclick = () => {
    if (button.getAttribute("aria-expanded") === "false") return button.open();
    box.hidden = true;
    button.setAttribute("aria-expanded", "false");
  };
  return [button, box];
}

function messageBox(message, name = "") {
  const box = element("div", `message ${name}`);
  box.append(element("small", "", `message ${message.message} · ${message.role}`), element("pre", "", message.text));
  return box;
}

function untrained(message) {
  const card = element("article", "untrained");
  card.id = `message-${message.message}`;
  const head = element("h3", "", `Message ${message.message}`);
  head.append(element("small", "", "an answer, not trained"));
  card.append(head, element("p", "warning", message.words), messageBox(message));
  return card;
}

function drawRefused(box) {
  const card = element("article"), { reason, words, message } = tokens.refused;
  card.append(element("h3", "", "Refused"));
  const refusal = element("p", "warning", `${reason}: ${words}`);
  for (const one of tokens.refused.messages) {
    const blamed = one.message === message;
    if (blamed) card.append(refusal);
    card.append(messageBox(one, blamed ? "blamed" : ""));
    if (blamed) card.lastChild.id = `message-${message}`;
  }
  if (!refusal.parentNode) card.append(refusal);
  box.append(card);
}

// --- the tree, as it is stored

function drawTree() {
  const box = $("tree");
  box.replaceChildren();
  const levels = [{ until: Infinity, box }]; // branches that a token may stand in
  let runs = null;
  const flush = () => { if (runs) blocks(runs.runs, -1, runs.box); runs = null; };
  tokens.stretches.forEach(([start, end, position, until, turn, role], at) => {
    const before = tokens.stretches[at - 1];
    const goesOn = before && position === before[2] + before[1] - before[0];
    if (goesOn && runs && before[4] === turn && before[5] === role) { runs.runs[0][1] = end; return; }
    flush();
    while (levels[levels.length - 1].until <= start) levels.pop();
    if (!goesOn && at) {
      const branch = element("div", "branch");
      levels[levels.length - 1].box.append(branch);
      levels.push({ until, box: branch });
    }
    const trained = tokens.predictors.has(start) || tokens.predictors.has(end - 1);
    const kind = KINDS[tokens.kind(start, trained)];
    const node = element("div", `node ${kind}${trained ? " trained" : ""}`), label = element("small");
    label.append(element("b", "", kind), ` turn ${turn} · ${number(start)} at position ${number(position)}`);
    node.append(label);
    levels[levels.length - 1].box.append(node);
    runs = { runs: [[start, end]], box: node };
  });
  flush();
}

// --- what other ways train on

function drawWays() {
  const box = $("ways");
  box.replaceChildren();
  if (tokens.refused) return;
  const at = Math.max(0, current), { prompt } = tokens.turns[at];
  const inference = tokens.parts(at).map((part) => ({ n: part.end - part.start, kind: part.kind, trained: part.trained }));
  const kept = []; // all that was said, in one sequence
  let hidden = 0, longest = 0;
  for (let turn = 0; turn <= at; turn++)
    for (const part of tokens.parts(turn, tokens.turns[turn].shared)) {
      const n = part.end - part.start;
      if (!part.trained && part.kind > 0 && turn) continue; // an answer that stands there already
      const wrong = turn < at && part.trained && part.kind === 1;
      if (wrong) hidden += n;
      kept.push({ n, kind: part.kind, trained: part.trained, wrong });
    }
  const last = tokens.turns.length - 1;
  const all = tokens.turns.map((turn) => turn.trained.reduce((sum, [a, b]) => sum + b - a, 0)), sum = all.reduce((a, b) => a + b, 0);
  const only = tokens.turns.flatMap((turn, n) => tokens.parts(n, turn.shared).filter((part) => n === last || part.trained || part.kind === 0)
    .map((part) => ({ n: part.end - part.start, kind: part.kind, trained: n === last && part.trained, lost: n !== last && part.trained })));
  const dropped = hidden && !inference.some((part, n) => part.kind === 1 && !part.trained);
  const lanes = [
    ["What inference sends, and the model must answer", inference, `${number(prompt)} tokens sent, ${number(all[at])} to be generated. One pass trains on exactly this, at every turn.`],
    ["One plain pass, reasoning kept", kept, hidden
      ? `${dropped ? `${number(hidden)} tokens of earlier reasoning stand before the answer, which inference never sends (hatched).` : `${number(hidden)} tokens of earlier reasoning stand before the answer (hatched).`}`
      : "No earlier reasoning stands before this answer."],
    ["The last turn only", only, last ? `${number(all[last])} of ${number(sum)} targets are trained; ${number(sum - all[last])} are lost (hatched).` : "There is one turn only: it is the same."],
  ];
  box.append(element("p", "", `Turn ${at}: solid is trained, pale is read. Choose another turn above.`));
  longest = Math.max(...lanes.map(([, parts]) => parts.reduce((total, part) => total + part.n, 0)));
  for (const [title, parts, words] of lanes) {
    const lane = element("div", "lane"), bar = element("i");
    let total = 0;
    for (const part of parts) {
      const piece = element("b", `${KINDS[part.kind]}${part.trained ? " trained" : ""}${part.wrong ? " wrong" : ""}${part.lost ? " lost" : ""}`);
      piece.style.flex = `${part.n} 1 0`;
      piece.title = `${KINDS[part.kind]}, ${number(part.n)} tokens`;
      bar.append(piece);
      total += part.n;
    }
    if (total < longest) { const rest = element("u"); rest.style.flex = `${longest - total} 1 0`; bar.append(rest); }
    lane.append(element("h4", "", title), bar, element("p", "", words));
    box.append(lane);
  }
}
