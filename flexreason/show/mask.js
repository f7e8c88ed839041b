// The mask: exact up to 2,048 tokens, a stretch at a time; above, the blocks that a kernel is given. Never S x S.
const EXACT = 2048;

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

function drawMask() {
  const canvas = $("cells");
  if (!tokens || tokens.refused || !canvas.offsetParent) return;
  const n = tokens.length, size = Math.round(canvas.clientWidth * devicePixelRatio);
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const pen = canvas.getContext("2d"), scale = size / n;
  pen.clearRect(0, 0, size, size);
  pen.fillStyle = colour("card");
  pen.fillRect(0, 0, size, size);
  if (n <= EXACT) {
    for (const [start, end, , until, , role] of tokens.stretches) {
      pen.fillStyle = colour(role & PROMPT ? "prompt" : role & REASONING ? "reasoning" : "response");
      pen.globalAlpha = 0.75;
      pen.beginPath(); // column kv is seen from row kv to row until
      pen.moveTo(start * scale, start * scale);
      for (let kv = start; kv < end; kv++) { pen.lineTo((kv + 1) * scale, kv * scale); pen.lineTo((kv + 1) * scale, Math.min(kv + 1, end) * scale); }
      pen.lineTo(end * scale, until * scale);
      pen.lineTo(start * scale, until * scale);
      pen.fill();
    }
  } else {
    const { side, rows } = tokens.blocks;
    pen.fillStyle = colour("prompt");
    rows.forEach((row, q) => {
      for (const [first, last, full] of row) {
        pen.globalAlpha = full ? 0.85 : 0.35;
        pen.fillRect(first * side * scale, q * side * scale, (last + 1 - first) * side * scale, side * scale);
      }
    });
  }
  pen.globalAlpha = 1;
  if (n > 128) {
    pen.strokeStyle = colour("line");
    pen.lineWidth = 1;
    const every = tokens.blocks.side * Math.max(1, Math.ceil(n / tokens.blocks.side / 48));
    pen.beginPath();
    for (let at = every; at < n; at += every) {
      pen.moveTo(Math.round(at * scale) + .5, 0); pen.lineTo(Math.round(at * scale) + .5, size);
      pen.moveTo(0, Math.round(at * scale) + .5); pen.lineTo(size, Math.round(at * scale) + .5);
    }
    pen.stroke();
  }
  if (here >= 0) {
    pen.fillStyle = colour("ink");
    pen.globalAlpha = 0.22;
    pen.fillRect(0, here * scale, size, Math.max(2, scale));
    pen.fillRect(here * scale, 0, Math.max(2, scale), size);
    pen.globalAlpha = 1;
  }
  const count = (kind) => tokens.blocks.rows.reduce((sum, row) => sum + row.reduce((n, [a, b, full]) => n + (full === kind ? b + 1 - a : 0), 0), 0);
  $("mask-words").textContent = `A row is a token that reads, a column one that is read. ${number(n)} x ${number(n)} cells, in blocks of ${tokens.blocks.side}: ` +
    `${number(count(1))} seen whole, ${number(count(0))} in part${n > EXACT ? " (pale)" : ""}; no other is computed.`;
}

function cellAt(event) {
  const box = $("cells").getBoundingClientRect(), n = tokens.length;
  const clip = (x, size) => Math.min(n - 1, Math.max(0, Math.floor((x / size) * n)));
  return [clip(event.clientY - box.top, box.height), clip(event.clientX - box.left, box.width)];
}

$("cells").addEventListener("pointermove", (event) => {
  const [q, kv] = cellAt(event);
  const name = (index) => `“${tokens.texts[index].replaceAll("\n", "↵")}” (${number(index)}, turn ${tokens.turn[index]})`;
  $("cell").textContent = `${name(q)} ${tokens.sees(q, kv) ? "sees" : "does not see"} ${name(kv)}`;
});
$("cells").addEventListener("pointerdown", (event) => { pinned = true; choose(cellAt(event)[0]); });
