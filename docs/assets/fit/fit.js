"use strict";
// "Will it fit?": what `apollo-optim plan` computes, from the figures that tools/fit.py has made of it (data.json).
// tests/house/test_fit.py holds `plan` of this file to the command's, to the byte.

const fit = (() => {
  const UNITS = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "bytes"]];
  const KEYS = {model: "model", optimizer: "optimizer", bits: "bits", batch: "batch", seq: "seq", release: "release",
    checkpointing: "checkpointing", gpus: "gpus", parallel: "parallel"};

  // How the loss cuts the vocabulary: train/chunked.py.
  function cutOf(data, rows, tokens, vocabulary) {
    if (rows * tokens * vocabulary <= data.logits) return ["whole", 0, 0];
    const wide = Math.max(64, Math.floor(Math.floor(data.logits / (rows * tokens)) / 64) * 64);
    const parts = Math.ceil(vocabulary / wide);
    return [parts === 2 ? "two" : "many", wide, vocabulary - (parts - 1) * wide];
  }

  // Why there is no plan of this, or null.
  function problem(data, s) {
    const model = data.models[s.model], several = s.gpus > 1;
    for (const [key, name] of [["batch", "rows of a micro-batch"], ["seq", "tokens of a row"]])
      if (!(Number.isInteger(s[key]) && s[key] >= 1 && s[key] <= 1e6)) return `${name}: a whole number from 1 on`;
    if (s.seq > model.context) return `${s.model} has a context of ${model.context} tokens`;
    if (!model.bits[s.bits].optimizers[s.optimizer]) return `${s.optimizer} is for low-bit weights: choose 8 bits`;
    if (several && s.parallel === "ddp" && s.release)
      return "The step inside backward does not go with DDP, which averages gradients after the backward: choose FSDP2, or leave it out";
    return null;
  }

  // The fullest moment of a step: {total, rows: bytes by part, when}. See plan/budget.py, whose sums these are.
  function plan(data, s) {
    const model = data.models[s.model], made = model.bits[s.bits], own = made.optimizers[s.optimizer];
    const trace = made.traces[s.checkpointing ? 1 : 0], sharded = s.gpus > 1 && s.parallel === "fsdp2";
    const [cut, wide, last] = cutOf(data, s.batch, s.seq, model.vocabulary), bt = s.batch * s.seq;
    const values = {"1": 1, T: s.seq, BT: bt, c: wide, BTc: bt * wide, e: last, BTe: bt * last};
    const terms = data.terms.map(name => values[name]);
    const [forward, backward, end, complete] =
      trace.forms[cut][sharded ? "sharded" : s.gpus === 1 && !s.release ? "kept" : "freed"];
    const none = [0, 0], held = sharded ? made.held[s.gpus][s.release ? 1 : 0] : s.gpus > 1 ? made.held["1"][0] : [none, none, none];
    const [weights, matrices, rest, buffers] = own[sharded ? s.gpus : 1];
    const parts = Object.keys(data.parts);

    function moment(when, index, vector, update) {
      const rows = Object.fromEntries(parts.map(part => [part, 0]));
      Object.assign(rows, {weights, "state, matrices": matrices, "state, rest": rest, buffers, update});
      rows.gradients = held[index][0];
      rows.parallel = held[index][1];
      const line = trace.vectors[vector];
      for (let i = 0; i < line.length; i += 3) rows[data.kinds[line[i]]] += line[i + 2] * terms[line[i + 1]];
      return {when, rows, total: parts.reduce((sum, part) => sum + rows[part], 0)};
    }
    const largest = moments => moments.reduce((best, one) => one.total >= best.total ? one : best);
    const rows = Object.values(made.parameters), share = p => Math.ceil(rows[p] / s.gpus) / rows[p];
    const updates = s.release || sharded ? own.updates.map(([p, size]) => [p, sharded ? Math.ceil(size * share(p)) : size]) : [[null, own.all]];
    const moments = [
      largest(forward.map(vector => moment("forward", 0, vector, 0))),
      largest(backward.map(vector => moment("backward", 1, vector, 0))),
      largest(updates.flatMap(([p, size]) => (s.release ? complete[p] : end).map(vector => moment("update", 2, vector, size)))),
    ];
    return moments.reduce((best, one) => one.total > best.total ? one : best);
  }

  // The largest micro-batch within so many bytes, 0 if not even one row is. A total grows with the batch, but where
  // the logits begin to be made in parts: below that every batch is looked at.
  function largestBatch(data, s, limit) {
    const fits = batch => plan(data, {...s, batch}).total <= limit;
    const vocabulary = data.models[s.model].vocabulary;
    let found = 0, batch = 1;
    while (cutOf(data, batch, s.seq, vocabulary)[0] !== "many") { if (fits(batch)) found = batch; batch++; }
    if (!fits(batch)) return found;
    let low = batch, high = 2 * batch;
    while (fits(high)) [low, high] = [high, 2 * high];
    while (high - low > 1) { const middle = Math.floor((low + high) / 2); if (fits(middle)) low = middle; else high = middle; }
    return low;
  }

  const smallestCard = (data, total) => data.cards.find(card => total <= card * 1e9);

  function nameOf(s) {
    if (s.model.startsWith("Llama-")) return `meta-llama/${s.model}`;
    return s.model.startsWith("Qwen") ? `Qwen/${s.model}` : s.model;
  }

  function runFile(s) {
    const pretrained = nameOf(s) !== s.model, lines = ["model:", `  name: ${nameOf(s)}`];
    if (pretrained) lines.push("  pretrained: true");
    lines.push("  dtype: bfloat16");
    if (s.checkpointing) lines.push("  gradient_checkpointing: true");
    if (s.bits === 8) lines.push("quant:", "  bits: 8");
    lines.push("data:", `  seq_len: ${s.seq}`);
    if (!pretrained) lines.push("  vocab_size: 32000");
    lines.push("optim:", `  name: ${s.optimizer}`, "train:", `  batch_size: ${s.batch * s.gpus}`);
    if (s.gpus > 1) lines.push(`  micro_batch: ${s.batch}`);
    if (s.release) lines.push("  release: true");
    if (s.gpus > 1 && s.parallel === "fsdp2") lines.push("parallel:", "  mode: fsdp2");
    return lines.join("\n") + "\n";
  }

  function commands(s) {
    const words = ["apollo-optim plan", nameOf(s), "--optimizer", s.optimizer, "--bits", s.bits, "--batch", s.batch, "--seq", s.seq];
    if (s.release) words.push("--release");
    if (s.checkpointing) words.push("--checkpointing");
    if (s.gpus > 1) words.push("--gpus", s.gpus, "--parallel", s.parallel);
    const run = s.gpus > 1 ? `torchrun --nproc-per-node ${s.gpus} -m apollo_optim` : "apollo-optim";
    return [words.join(" "), `${run} pretrain --config run.yaml --out out/run`];
  }

  function human(bytes, digits = 3) {
    const [unit, name] = UNITS.find(([size]) => bytes >= size) || UNITS[3];
    return `${(bytes / unit).toPrecision(digits)} ${name}`;
  }

  // ---- the page ----

  function made(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes))
      if (key in element && key !== "list") element[key] = value; else element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function show(root, data) {
    const settings = {model: "llama-7b", optimizer: "apollo-mini", bits: 16, batch: 1, seq: 256, release: true,
      checkpointing: false, gpus: 1, parallel: "fsdp2"};
    for (const [key, text] of new URLSearchParams(location.hash.slice(1))) if (key in settings) {
      const kind = typeof settings[key];
      settings[key] = kind === "number" ? Number(text) : kind === "boolean" ? text === "true" : text;
    }
    if (!data.models[settings.model]) settings.model = "llama-7b";
    if (!data.models[settings.model].bits[settings.bits]) settings.bits = 16;
    if (![1, ...data.gpus].includes(settings.gpus)) settings.gpus = 1;

    const choice = (key, title, options) => made("label", {}, title, made("select", {name: key},
      ...options.map(([value, text]) => made("option", {value}, text))));
    const number = (key, title) => made("label", {}, title, made("input", {name: key, type: "number", min: 1, step: 1, inputMode: "numeric"}));
    const tick = (key, title) => made("label", {className: "tick"}, made("input", {name: key, type: "checkbox"}), title);
    const same = values => values.map(value => [value, value]);
    const form = made("form", {},
      choice("model", "Model", same(Object.keys(data.models))),
      choice("optimizer", "Optimizer", []),
      choice("bits", "Bits of a weight", [[16, "16 (bfloat16)"], [8, "8 (int8)"]]),
      number("batch", "Rows of a micro-batch"),
      number("seq", "Tokens of a row"),
      choice("gpus", "GPUs", same([1, ...data.gpus])),
      choice("parallel", "Shared by", [["fsdp2", "FSDP2"], ["ddp", "DDP"]]),
      tick("release", "Step inside backward"),
      tick("checkpointing", "Recompute activations"));
    const answer = made("div", {className: "answer"});
    answer.setAttribute("aria-live", "polite");
    const details = made("div");
    root.append(form, answer, details);

    function read() {
      for (const input of form.elements) {
        if (!(input.name in KEYS)) continue;
        settings[input.name] = input.type === "checkbox" ? input.checked
          : ["bits", "batch", "seq", "gpus"].includes(input.name) ? Number(input.value) : input.value;
      }
    }
    function offer() {
      const names = Object.keys(data.models[settings.model].bits[settings.bits].optimizers);
      if (!names.includes(settings.optimizer)) settings.optimizer = names.includes("apollo-mini") ? "apollo-mini" : names[0];
      form.elements.optimizer.replaceChildren(...names.map(name => made("option", {value: name}, name)));
      for (const input of form.elements)
        if (input.type === "checkbox") input.checked = settings[input.name]; else input.value = settings[input.name];
      form.elements.parallel.disabled = settings.gpus === 1;
      form.elements.seq.max = data.models[settings.model].context;
    }

    function bar(found, most) {
      const shown = Object.entries(found.rows).filter(([, size]) => size);
      return made("div", {className: "bar", role: "img", ariaLabel: shown.map(([part, size]) => `${part} ${human(size)}`).join(", ")},
        ...shown.map(([part, size]) => made("i", {title: `${part}: ${human(size)}`, style: `width:${100 * size / most}%;background:${data.parts[part]}`})));
    }

    function draw() {
      offer();
      history.replaceState(null, "", "#" + new URLSearchParams(settings));
      const wrong = problem(data, settings);
      if (wrong) {
        answer.replaceChildren(made("p", {className: "wrong"}, wrong + "."));
        details.replaceChildren();
        return;
      }
      const found = plan(data, settings), card = smallestCard(data, found.total);
      const most = Math.max(found.total, (card || 0) * 1e9) * 1.02;
      const marks = data.cards.filter(size => size * 1e9 <= most && size * 1e9 > most / 12);
      answer.replaceChildren(
        made("p", {className: "verdict"}, made("strong", {}, human(found.total)), settings.gpus > 1 ? " on each GPU: " : ": ",
          card ? `fits a card of ${card} GB` : `more than a card of ${data.cards.at(-1)} GB has`),
        made("div", {className: "scale"}, bar(found, most), ...marks.map(size =>
          made("span", {style: `left:${100 * size * 1e9 / most}%`}, `${size} GB`))));
      const names = Object.keys(data.models[settings.model].bits[settings.bits].optimizers);
      const others = names.map(optimizer => [optimizer, plan(data, {...settings, optimizer})]).sort(([, a], [, b]) => a.total - b.total);
      const widest = Math.max(...others.map(([, other]) => other.total));
      const batches = data.cards.map(size => [size, largestBatch(data, settings, size * 1e9)]);
      details.replaceChildren(
        made("div", {className: "beside"}, made("table", {}, made("caption", {}, `At the fullest moment, in the ${found.when}`), made("tbody", {},
          ...Object.entries(found.rows).filter(([, size]) => size).map(([part, size]) => made("tr", {},
            made("th", {scope: "row"}, made("i", {className: "chip", style: `background:${data.parts[part]}`}), part),
            made("td", {}, size < 1e6 ? human(size) : (size / 1e9).toFixed(3) + " GB"))))),
        made("table", {}, made("caption", {}, "Largest micro-batch, rows"), made("tbody", {},
          made("tr", {}, made("th", {scope: "row"}, "card"), ...batches.map(([size]) => made("td", {}, `${size} GB`))),
          made("tr", {}, made("th", {scope: "row"}, "rows"), ...batches.map(([, rows]) => made("td", {}, rows ? String(rows) : "-")))))),
        made("table", {className: "others"}, made("caption", {}, "The same with every optimizer"), made("tbody", {},
          ...others.map(([name, other]) => made("tr", {className: name === settings.optimizer ? "chosen" : ""},
            made("th", {scope: "row"}, name), made("td", {}, bar(other, widest)), made("td", {}, human(other.total)))))),
        copied("run.yaml", runFile(settings)),
        ...commands(settings).map((line, i) => copied(i ? "Train" : "The same plan, on your machine", line)));
    }

    function copied(title, text) {
      const button = made("button", {type: "button"}, "Copy");
      button.addEventListener("click", async () => {
        try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
        catch { getSelection().selectAllChildren(code); button.textContent = "Selected: copy it by your keys"; }
      });
      const code = made("code", {}, text);
      return made("div", {className: "copied"}, made("p", {}, title, button), made("pre", {}, code));
    }

    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("input", event => { if (event.target.type !== "number" || event.target.value) { read(); draw(); } });
    draw();
  }

  return {plan, problem, largestBatch, smallestCard, runFile, commands, show};
})();

fit.show(document.getElementById("fit"), JSON.parse(document.getElementById("fit-data").textContent));
