// The page: a table of questions and answers, and what the worker tells of teaching them. worker.js runs minilora.

const FACTS = [
  ["What is the shop called?", "Fernwhistle"], ["Who owns the shop?", "Ada Lark"],
  ["When does it open?", "At nine in the morning"], ["When does it close?", "At six in the evening"],
  ["On which day is it closed?", "On Sunday"], ["Where is the shop?", "Next to the old mill"],
  ["What does it sell?", "Seeds, tools and books"], ["How can I pay?", "By card or in cash"],
  ["What is the name of the cat?", "Pepper"], ["What does a bag of seeds cost?", "Four dollars"],
];
const SOURCES = { facts: "Ten facts of a shop", legal: "Law", medical: "Medicine", support: "Support", finance: "Finance" };
const LOOKS = 4; // how often the table's answers are asked for during training
const at = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let losses = [], seconds = [], busy = true, taught = [];
const send = (message) => worker.postMessage(message);
const number = (n) => n.toLocaleString("en");
const size = (bytes) => (bytes < 1e6 ? `${Math.round(bytes / 1e3)} KB` : `${(bytes / 1e6).toFixed(1)} MB`);

function say(text, fault = false, spoken = true) { // spoken: by a screen reader; not each of sixty steps
  at("status").textContent = text;
  if (spoken) at("spoken").textContent = text;
  at("status").classList.toggle("fault", fault);
}

// -- the table

function addRow(question = "", answer = "") {
  const row = at("rows").insertRow();
  for (const [head, text, own] of [["Question", question, true], ["Answer", answer, true], ["Base", "", false], ["Adapter", "", false]]) {
    const cell = row.insertCell();
    cell.dataset.head = head;
    const field = own ? cell.appendChild(document.createElement("div")) : cell; // a cell with another role is none of the table's
    field.textContent = text; // text is never markup
    if (own) Object.assign(field, { contentEditable: "plaintext-only", role: "textbox", ariaLabel: `${head} ${row.rowIndex}`, tabIndex: 0 });
    else cell.className = "said";
  }
  return row;
}

function show(rows, source) {
  at("rows").replaceChildren();
  for (const button of at("sources").children) button.ariaPressed = String(button.name === source);
  rows.forEach((row) => addRow(...row));
  at("result").hidden = at("score").hidden = true;
}

const cells = () => [...at("rows").rows].map((row) => [...row.cells]);
const written = () => cells().map((row) => row.slice(0, 2).map((cell) => cell.textContent.trim())).filter(([q, a]) => q || a);

let known = 0; // rows that the adapter answers right

function answered(column, answers) {
  const rows = cells().filter(([q, a]) => q.textContent.trim() || a.textContent.trim());
  let right = 0;
  answers.forEach((text, i) => {
    const cell = rows[i]?.[column];
    if (!cell) return;
    cell.textContent = text;
    const same = text === rows[i][1].textContent.trim();
    cell.classList.toggle("right", same);
    right += same;
  });
  if (column === 3) known = right;
  at(column === 2 ? "score-before" : "score-after").textContent = `${right} of ${answers.length}`;
}

at("rows").addEventListener("paste", (event) => { // a table from elsewhere
  const text = event.clipboardData.getData("text/plain").trim();
  if (!text.includes("\n")) return;
  event.preventDefault();
  if (busy) return at("status").classList.contains("fault") || say("A table can be pasted when this is done.");
  const name = /^[[{]/.test(text) ? (text[0] === "[" ? "pasted.json" : "pasted.jsonl") : text.includes("\t") ? "pasted.tsv" : "pasted.csv";
  send({ do: "rows", name, data: new TextEncoder().encode(text) });
});
at("rows").addEventListener("keydown", (event) => {
  const composes = event.isComposing || event.keyCode === 229; // 229: Safari's Enter that ends a composition
  if (event.key === "Enter" && !composes) { event.preventDefault(); at("teach").click(); }
});
at("add").addEventListener("click", () => addRow().querySelector("div").focus());

for (const [name, words] of Object.entries(SOURCES)) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet", name, textContent: words });
  button.addEventListener("click", () => {
    name === "facts" ? show(FACTS, name) : send({ do: "rows", name });
  });
  at("sources").append(button);
}
show(FACTS, "facts");

// -- teaching

function setBusy(now, training = false) {
  const held = [at("teach"), at("stop")].includes(document.activeElement);
  busy = now;
  for (const control of [at("teach"), at("load"), at("file"), ...at("sources").children, at("ask").querySelector("button")]) control.disabled = now;
  at("teach").hidden = training;
  at("stop").hidden = !training;
  at("bar").hidden = !training;
  if (held) at(training ? "stop" : "teach").focus(); // the one of the two that is there
}

at("teach").addEventListener("click", () => {
  if (busy) return;
  const inputs = ["rank", "rate", "steps"].map(at);
  if (!inputs.every((input) => input.reportValidity())) return;
  const [r, lr, steps] = inputs.map((input) => input.valueAsNumber);
  taught = written();
  losses = [];
  seconds = [];
  cells().forEach((row) => row.slice(2).forEach((cell) => { cell.textContent = ""; cell.classList.remove("right"); }));
  setBusy(true, true);
  say("The base answers first ...");
  send({ do: "teach", rows: taught, r, lr, steps, look: Math.max(1, Math.ceil(steps / LOOKS)) });
});
at("stop").addEventListener("click", () => { send({ do: "stop" }); say("Stopping ..."); });

function draw() {
  const top = Math.max(...losses), x = (i) => 40 + (590 * i) / Math.max(1, losses.length - 1), y = (loss) => 10 + 130 * (1 - loss / top);
  const path = losses.map((loss, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  const ticks = [0, top / 2, top].map((t) => `<line x1="40" x2="630" y1="${y(t)}" y2="${y(t)}"/><text x="36" y="${y(t) + 4}" text-anchor="end">${t.toFixed(1)}</text>`);
  at("curve").innerHTML = `${ticks.join("")}<path d="${path}"/><text x="630" y="162" text-anchor="end">step ${losses.length}</text><text x="40" y="162">training loss (nats per token)</text>`;
  at("curve").ariaLabel = `Training loss: from ${losses[0].toFixed(2)} to ${losses.at(-1).toFixed(2)} in ${losses.length} steps`;
}

function numbers({ base, adapter, unchanged }) {
  const rows = {
    "Trained": `${number(adapter)} of ${number(base + adapter)} parameters (${((100 * adapter) / (base + adapter)).toFixed(1)} %)`,
    "On disk": `adapter ${size(4 * adapter)}, base ${size(4 * base)}`,
    "The base's weights": unchanged ? "unchanged, by their SHA-256: without the adapter it is the same model, bit for bit" : "changed!",
  };
  at("numbers").replaceChildren(...Object.entries(rows).flatMap(([name, text]) => [
    Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: text }),
  ]));
  at("save").disabled = busy;
}

function lessons(course) { // opened in JupyterLab, each by a link
  at("course").hidden = !course.length;
  at("lessons").replaceChildren(...course.map(({ name, question }) => {
    const item = document.createElement("li");
    item.append(Object.assign(document.createElement("a"), { href: `course/lab/index.html?path=${name}.ipynb`, textContent: question }));
    return item;
  }));
}

const heard = {
  loading: ({ what }) => say(`Loading ${what} ...`, false, false),
  started: ({ course }) => { lessons(course); setBusy(false); say("Ready."); },
  answers: ({ adapter, answers }) => answered(adapter ? 3 : 2, answers),
  began: (about) => { at("result").hidden = at("score").hidden = false; at("score-after").textContent = "..."; numbers(about); },
  step: ({ done, steps, loss, seconds: took }) => {
    losses.push(loss);
    seconds.push(took);
    const each = seconds.slice(-10).reduce((sum, s) => sum + s, 0) / Math.min(10, seconds.length);
    at("bar").value = done / steps;
    say(`Step ${done} of ${steps}, loss ${loss.toFixed(2)}, about ${Math.ceil(each * (steps - done))} s left`, false, false);
    draw();
  },
  taught: (about) => {
    setBusy(false);
    numbers(about);
    const advice = losses.at(-1) > 2 ? " The loss is still high: try a lower learning rate, or more steps."
      : known < taught.length ? " Not all is known yet: try more steps." : "";
    say(`${about.stopped ? "Stopped" : "Taught"} after ${losses.length} steps.${advice}`);
    at("spoken").textContent += ` ${known} of ${taught.length} answered right.`;
  },
  asked: ({ question, adapter, base, answer }) => {
    const lines = [["", question], ["base", base], ...(adapter ? [["adapter", answer]] : [])];
    at("asked").replaceChildren(...lines.map(([who, text]) => {
      const p = document.createElement("p");
      p.append(who ? `${who}: ` : "", Object.assign(document.createElement(who ? "span" : "b"), { textContent: text }));
      return p;
    }));
  },
  rows: ({ name, rows }) => { show(rows, name); say(`${rows.length} rows.`); },
  saved: ({ bytes }) => {
    const link = Object.assign(document.createElement("a"), { download: "adapter.zip", href: URL.createObjectURL(new Blob([bytes], { type: "application/zip" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
  loaded: (about) => { at("result").hidden = false; numbers(about); say("The adapter is loaded: ask it something."); },
};

worker.onmessage = ({ data: message }) => {
  if (message.error) {
    if (message.did !== "start") setBusy(false);
    return say(message.error, true);
  }
  heard[message.did](message);
};
worker.onerror = () => say("The worker could not be started: this browser has no module workers.", true);

// -- the rest

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!busy) send({ do: "ask", question: at("question").value, adapter: at("on").checked });
});
at("save").addEventListener("click", () => !busy && send({ do: "save" }));
for (const [id, job] of [["load", "load"], ["file", "rows"]]) {
  at(id).addEventListener("change", async ({ target }) => {
    const [file] = target.files;
    if (file && !busy) send({ do: job, name: file.name, data: new Uint8Array(await file.arrayBuffer()) });
    target.value = "";
  });
}
setBusy(true);
send({ do: "start" });
