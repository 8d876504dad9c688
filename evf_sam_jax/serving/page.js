// The page's behaviour: shows a picture, takes clicks and boxes, asks /predict and /attention, and
// shows what they answer. EVF_COLORS is set by page.py: what masks are painted in.
"use strict";

const evfSam = (() => {
  const LONGEST_SIDE = 1024; // of the picture as shown, in pixels of the canvas
  const NEAR = 10; // pixels of the screen within which a click removes a point
  const INSIDE = "#00c853", OUTSIDE = "#ff1744", BOX = "#ffd600";
  // Black, purple, red, orange, pale yellow: brightness grows with attention.
  const HEAT = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

  let file = null; // as it was given: this is what is sent
  let picture = null; // as it is shown
  let mode = "Point inside";
  let points = []; // {x, y, label} in pixels of the picture
  let box = null; // [x0, y0, x1, y1] likewise
  let corner = null; // where a box being drawn began
  let pressed = null; // where a button or finger went down for a point, on the screen
  let layers = []; // one canvas a mask, in the order of the legend
  let alone = null; // the only mask to show
  let question = 0; // what is answered late is dropped

  const element = (id) => document.getElementById(id);
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  function start() {
    if (!element("evf-canvas") || !element("evf-file")) {
      requestAnimationFrame(start);
      return;
    }
    const canvas = element("evf-canvas"), drop = element("evf-drop");
    element("evf-file").addEventListener("change", (event) => load(event.target.files[0]));
    drop.addEventListener("dragover", (event) => event.preventDefault());
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      load(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => {
      const pasted = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
      if (pasted) load(pasted);
    });
    canvas.addEventListener("pointerdown", down);
    canvas.addEventListener("pointermove", move);
    canvas.addEventListener("pointerup", up);
    // A finger that scrolls the page instead.
    canvas.addEventListener("pointercancel", () => { corner = null, pressed = null; });
  }

  async function load(chosen) {
    if (!chosen) return;
    const number = ++question;
    let bitmap;
    try {
      bitmap = await createImageBitmap(chosen);
    } catch {
      say("evf-status", "The browser cannot show this file: expected PNG, JPEG, WebP, GIF or BMP.", true);
      return;
    }
    if (number !== question) return;
    picture = bitmap, file = chosen;
    points = [], box = null, layers = [], alone = null;
    const canvas = element("evf-canvas");
    const scale = Math.min(1, LONGEST_SIDE / Math.max(picture.width, picture.height));
    canvas.width = Math.max(1, Math.round(picture.width * scale));
    canvas.height = Math.max(1, Math.round(picture.height * scale));
    element("evf-drop").classList.add("evf-full");
    forget();
    for (const id of ["evf-heat", "evf-heat-png"]) if (element(id)) element(id).hidden = true;
    say("evf-status", `${picture.width} x ${picture.height} pixels. Type phrases, or click.`);
    draw();
  }

  function setMode(value) {
    mode = value;
    element("evf-canvas").classList.toggle("evf-drawing", mode === "Box");
  }

  function clearClicks() {
    points = [], box = null;
    draw();
  }

  // A place in the picture, in its pixels; `edge` also allows its far edges, as boxes do.
  function place(event, edge) {
    const shown = element("evf-canvas").getBoundingClientRect();
    const x = (event.clientX - shown.left) / shown.width * picture.width;
    const y = (event.clientY - shown.top) / shown.height * picture.height;
    const rest = edge ? 0 : 1;
    return [
      clamp(Math.round(edge ? x : Math.floor(x)), 0, picture.width - rest),
      clamp(Math.round(edge ? y : Math.floor(y)), 0, picture.height - rest),
    ];
  }

  // Of a `click` event the place is rounded, of pointer events it is not.
  function click(event) {
    const [x, y] = place(event, false);
    const near = NEAR * picture.width / element("evf-canvas").getBoundingClientRect().width;
    const before = points.length;
    points = points.filter((p) => Math.hypot(p.x - x, p.y - y) > near);
    if (points.length === before) points.push({ x, y, label: mode === "Point inside" ? 1 : 0 });
    draw();
  }

  function down(event) {
    if (!picture || event.button !== 0) return;
    if (mode !== "Box") {
      pressed = [event.clientX, event.clientY];
      return;
    }
    event.preventDefault();
    element("evf-canvas").setPointerCapture(event.pointerId);
    corner = place(event, true);
  }

  function move(event) {
    if (!corner) return;
    const [x, y] = place(event, true);
    box = [Math.min(corner[0], x), Math.min(corner[1], y), Math.max(corner[0], x), Math.max(corner[1], y)];
    draw();
  }

  function up(event) {
    if (pressed) {
      const moved = Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]);
      pressed = null;
      if (moved < NEAR) click(event);
      return;
    }
    if (!corner) return;
    move(event);
    corner = null;
    if (box[0] === box[2] || box[1] === box[3]) box = null; // a click is no box
    draw();
  }

  function draw() {
    const canvas = element("evf-canvas"), context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!picture) return;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    layers.forEach((layer, i) => {
      if (alone === null || alone === i) context.drawImage(layer, 0, 0);
    });
    const scale = canvas.width / picture.width;
    const unit = canvas.width / canvas.getBoundingClientRect().width || 1; // a pixel of the screen
    const line = (color, width) => {
      context.strokeStyle = color;
      context.lineWidth = width * unit;
      context.stroke();
    };
    if (box) {
      context.beginPath();
      context.rect(box[0] * scale, box[1] * scale, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale);
      line("black", 4);
      line(BOX, 2);
    }
    for (const { x, y, label } of points) {
      const [cx, cy] = [(x + 0.5) * scale, (y + 0.5) * scale];
      context.beginPath();
      context.arc(cx, cy, 7 * unit, 0, 2 * Math.PI);
      context.fillStyle = label ? INSIDE : OUTSIDE;
      context.fill();
      line("white", 2);
      context.beginPath();
      context.moveTo(cx - 4 * unit, cy);
      context.lineTo(cx + 4 * unit, cy);
      if (label) {
        context.moveTo(cx, cy - 4 * unit);
        context.lineTo(cx, cy + 4 * unit);
      }
      line("white", 2);
    }
    const said = [];
    if (points.length) said.push(points.length === 1 ? "1 point" : `${points.length} points`);
    if (box) said.push(`box ${box.join(", ")}`);
    element("evf-clicks").textContent = said.join("; ");
  }

  const lines = (phrases) => (phrases || "").split("\n").map((x) => x.trim()).filter((x) => x);

  // Asks an endpoint; an error is the sentence that the server says.
  async function ask(endpoint, fields) {
    const form = new FormData();
    form.append("image", file, "picture");
    for (const [name, value] of fields) form.append(name, value);
    let answer;
    try {
      answer = await fetch(endpoint, { method: "POST", body: form });
    } catch {
      throw new Error("The server does not answer.");
    }
    if (answer.ok) return answer;
    let reason = `The server answered ${answer.status}.`;
    try {
      reason = (await answer.json()).error || reason;
    } catch { /* no sentence in it */ }
    throw new Error(reason);
  }

  async function segment(phrases, semantic, multimask) {
    const texts = lines(phrases);
    if (!picture) return say("evf-status", "First choose a picture.", true);
    if (!texts.length && !points.length && !box)
      return say("evf-status", "Type a phrase, click a point, or draw a box.", true);
    const number = ++question;
    const fields = texts.map((text) => ["texts", text]);
    const each = (value) => JSON.stringify(Array(Math.max(1, texts.length)).fill(value));
    if (points.length) {
      fields.push(["points", each(points.map((p) => [p.x, p.y]))]);
      fields.push(["point_labels", each(points.map((p) => p.label))]);
    }
    if (box) fields.push(["boxes", each(box)]);
    fields.push(["semantic", String(!!semantic)], ["multimask", String(!!multimask)], ["png", "true"]);
    say("evf-status", "Looking ...");
    try {
      const found = await (await ask("predict", fields)).json();
      if (number === question) await show(found, number);
    } catch (error) {
      if (number === question) say("evf-status", error.message, true);
    }
  }

  async function show(found, number) {
    const [height, width] = found.size;
    const entries = found.prompts.flatMap((prompt) =>
      prompt.masks.map((mask, i) => ({
        mask,
        words: (prompt.text ?? "the clicks") +
          (prompt.masks.length > 1 ? `, alternative ${i + 1} of ${prompt.masks.length}` : ""),
      })));
    const painted = await Promise.all(
      entries.map(({ mask }, i) => paint(mask.png, EVF_COLORS[i % EVF_COLORS.length])));
    if (number !== question) return;
    forget();
    layers = painted;
    entries.forEach(({ mask, words }, i) => legend(i, mask, words, width * height));
    say("evf-status",
      "IoU is what SAM's own head estimates of the mask's shape; EVF-SAM does not train it.");
    for (const prompt of found.prompts) for (const mask of prompt.masks) delete mask.png;
    const rle = element("evf-rle");
    rle.href = URL.createObjectURL(new Blob([JSON.stringify(found)], { type: "application/json" }));
    rle.hidden = false;
    draw();
  }

  // A mask as a layer of one colour over the picture as shown.
  async function paint(png, color) {
    const canvas = element("evf-canvas");
    const layer = document.createElement("canvas");
    layer.width = canvas.width, layer.height = canvas.height;
    const context = layer.getContext("2d", { willReadFrequently: true });
    context.drawImage(await decoded(`data:image/png;base64,${png}`), 0, 0, layer.width, layer.height);
    const pixels = context.getImageData(0, 0, layer.width, layer.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const inside = pixels.data[i];
      pixels.data.set(color, i);
      pixels.data[i + 3] = inside * 0.55;
    }
    context.putImageData(pixels, 0, 0);
    return layer;
  }

  async function decoded(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    return image;
  }

  function legend(i, mask, words, pixels) {
    const entry = document.createElement("li");
    const swatch = document.createElement("span");
    swatch.className = "evf-swatch";
    swatch.style.background = `rgb(${EVF_COLORS[i % EVF_COLORS.length].join(",")})`;
    const text = document.createElement("span");
    text.className = "evf-words";
    text.textContent = words;
    const share = (100 * mask.area / pixels).toFixed(1);
    const facts = document.createElement("span");
    facts.className = "evf-facts";
    facts.textContent = (mask.no_target ? "nothing found; " : "") +
      `${mask.area.toLocaleString("en")} pixels (${share} %), IoU ${mask.predicted_iou?.toFixed(2) ?? "–"}`;
    const link = document.createElement("a");
    link.href = `data:image/png;base64,${mask.png}`;
    link.download = `mask_${i}.png`;
    link.textContent = "PNG";
    entry.append(swatch, text, facts, link);
    entry.addEventListener("pointerenter", () => { alone = i; draw(); });
    entry.addEventListener("pointerleave", () => { alone = null; draw(); });
    element("evf-legend").append(entry);
  }

  // Takes away what was found before.
  function forget() {
    layers = [], alone = null;
    element("evf-legend").replaceChildren();
    const rle = element("evf-rle");
    if (rle.href) URL.revokeObjectURL(rle.href);
    rle.hidden = true;
  }

  async function attend(phrases, semantic) {
    const texts = lines(phrases);
    if (!picture) return say("evf-attention-status", "First choose a picture.", true);
    if (!texts.length) return say("evf-attention-status", "Type a phrase.", true);
    const number = ++question;
    say("evf-attention-status", "Looking ...");
    try {
      const answer = await ask("attention", [["texts", texts[0]], ["semantic", String(!!semantic)]]);
      const png = await answer.blob();
      const url = URL.createObjectURL(png);
      const heat = await decoded(url);
      if (number !== question) return;
      drawHeat(heat);
      const link = element("evf-heat-png");
      if (link.href) URL.revokeObjectURL(link.href);
      link.href = url;
      link.hidden = false;
      say("evf-attention-status", `Where the model looks for “${texts[0]}”: the brighter, the more.`);
    } catch (error) {
      if (number === question) say("evf-attention-status", error.message, true);
    }
  }

  function drawHeat(heat) {
    const canvas = element("evf-heat"), shown = element("evf-canvas");
    canvas.width = shown.width, canvas.height = shown.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(heat, 0, 0, canvas.width, canvas.height);
    const values = context.getImageData(0, 0, canvas.width, canvas.height).data;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < values.length; i += 4) {
      const at = values[i] / 255 * (HEAT.length - 1), low = Math.min(HEAT.length - 2, Math.floor(at));
      const grey = 0.3 * pixels.data[i] + 0.59 * pixels.data[i + 1] + 0.11 * pixels.data[i + 2];
      for (let c = 0; c < 3; c++) {
        const hot = HEAT[low][c] + (HEAT[low + 1][c] - HEAT[low][c]) * (at - low);
        pixels.data[i + c] = 0.35 * grey + 0.65 * hot;
      }
    }
    context.putImageData(pixels, 0, 0);
    canvas.hidden = false;
  }

  function say(id, text, wrong = false) {
    const place = element(id);
    place.textContent = text;
    place.classList.toggle("evf-wrong", wrong);
  }

  return { start, setMode, clearClicks, segment, attend };
})();
