// Runs Python in the browser, in a worker, so that the page stays awake. playground.py does the work.
//
// The page sends {do, ...}; each message but "stop" is answered by {did, ...} or {error}. During training there are also messages
// {did: "step", done, steps, loss, seconds}. Between two steps the worker reads its messages, so that "stop" arrives.

let pyodide, playground, running = false;
const say = (message, transfer = []) => postMessage(message, transfer);

async function fetched(url, sha256) {
  const hash = sha256 && "sha256-" + btoa(String.fromCharCode(...sha256.match(/../g).map((pair) => parseInt(pair, 16))));
  const answer = await fetch(url, hash ? { integrity: hash } : {}).catch(() => null);
  if (!answer?.ok) throw new Error(`${url} could not be loaded, or is not the file that was expected: reload the page, or write it again with minilora site FOLDER --pyodide PYODIDE`);
  return answer;
}

async function start() {
  const site = await (await fetched("site.json")).json();
  for (const [name, sha256] of Object.entries(site.sha256)) {
    say({ did: "loading", what: name });
    await fetched(site.pyodide + name, sha256); // checked here; Pyodide takes it from the browser's cache
  }
  const { loadPyodide } = await import(new URL(site.pyodide + "pyodide.mjs", location).href);
  pyodide = await loadPyodide({ indexURL: new URL(site.pyodide, location).href });
  say({ did: "loading", what: "NumPy" });
  await pyodide.loadPackage("numpy", { messageCallback: () => {} });
  say({ did: "loading", what: "minilora" });
  pyodide.unpackArchive(await (await fetched(site.package)).arrayBuffer(), "zip", { extractDir: "/home/pyodide" });
  playground = pyodide.runPython("from minilora.site.playground import Playground\nPlayground()");
  return site.course;
}

const plain = (proxy) => (proxy?.toJs ? proxy.toJs({ dict_converter: Object.fromEntries }) : proxy);
const answers = (questions, adapter) => plain(playground.answers(pyodide.toPy(questions), adapter));
const about = () => plain(playground.about());

async function teach({ rows, r, lr, steps, look }) {
  const questions = rows.map(([question]) => question);
  playground.begin(pyodide.toPy(rows), r, lr, steps);
  say({ did: "answers", adapter: false, answers: answers(questions, false) });
  say({ did: "began", ...about() });
  running = true;
  for (let done = 1; running && done <= steps; done++) {
    const before = performance.now();
    const loss = playground.step();
    say({ did: "step", done, steps, loss, seconds: (performance.now() - before) / 1000 });
    if (done % look === 0 && done < steps) say({ did: "answers", adapter: true, answers: answers(questions, true) });
    await new Promise((resolve) => setTimeout(resolve)); // messages that came meanwhile are read
  }
  const stopped = !running;
  running = false;
  playground.stop();
  say({ did: "answers", adapter: true, answers: answers(questions, true) });
  say({ did: "taught", stopped, ...about() });
}

const jobs = {
  start: async () => { const course = await start(); say({ did: "started", course, ...about() }); },
  teach,
  stop: () => { running = false; },
  ask: ({ question, adapter }) => say({ did: "asked", question, adapter, base: answers([question], false)[0], answer: adapter ? answers([question], true)[0] : null }),
  rows: ({ name, data }) => say({ did: "rows", name, rows: plain(playground.rows_of(name, data ? pyodide.toPy(data) : undefined)) }),
  save: () => {
    const bytes = plain(playground.save());
    say({ did: "saved", bytes }, [bytes.buffer]);
  },
  load: ({ data }) => { playground.load(pyodide.toPy(data)); say({ did: "loaded", ...about() }); },
};

const NO_MEMORY = "out of memory: use a lower rank, fewer rows, or shorter answers";
function line(error) { // the last line of a traceback, without the class: what a person can act on
  const last = String(error?.message ?? error).trim().split("\n").at(-1);
  const [, kind, words] = last.match(/^(?:[\w.]+\.)?(\w+(?:Error|Exception)): ?(.*)$/s) ?? [, "", last];
  if (/memory|Array buffer allocation/i.test(kind + last)) return NO_MEMORY;
  return words || last;
}

onmessage = async ({ data: message }) => {
  try {
    await jobs[message.do](message);
  } catch (error) {
    running = false;
    console.debug(error); // the whole of it, for those who look for a fault in minilora
    say({ did: message.do, error: line(error) });
  }
};
