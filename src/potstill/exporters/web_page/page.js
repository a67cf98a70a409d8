// A conversation with the model of this folder. What people and models say is only ever set as text, never as markup.
import { Wllama, LoggerWithoutDebug } from "./wllama.js";

const WORDS = {
  en: {
    hello: "This model runs in your browser. What you write stays on your device.",
    loading: "Loading the model…", preparing: "Preparing the model…", ready: "Ready. Ask something.", measuring: "Measuring…",
    question: "Your question", placeholder: "Ask something", send: "Send", stop: "Stop", again: "New chat",
    remember: "Remember earlier turns", stopped: " (stopped)", cut: " (cut: no room left)",
    facts: (c) => `${size(c.bytes)}, ${c.type}, ${c.positions.toLocaleString("en")} positions`,
    speed: (n, rate, first) => `${n} tokens, ${rate.toFixed(1)} tokens/s, first after ${first.toFixed(1)} s`,
    long: "That no longer fits into the model. Start a new chat, or ask for less.",
    failed: (why) => `The model could not be loaded: ${why}. A current Chrome, Edge or Firefox can run it.`,
    missing: (file) => `The file ${file} is missing here or not whole. Copy the folder again.`,
    broke: (why) => `The answer broke off: ${why}`, other: "Español", code: "ES",
  },
  es: {
    hello: "Este modelo funciona en tu navegador. Lo que escribes no sale de tu dispositivo.",
    loading: "Cargando el modelo…", preparing: "Preparando el modelo…", ready: "Listo. Pregunta algo.", measuring: "Midiendo…",
    question: "Tu pregunta", placeholder: "Pregunta algo", send: "Enviar", stop: "Parar", again: "Nuevo chat",
    remember: "Recordar lo anterior", stopped: " (detenido)", cut: " (cortado: no queda sitio)",
    facts: (c) => `${size(c.bytes)}, ${c.type}, ${c.positions.toLocaleString("es")} posiciones`,
    speed: (n, rate, first) => `${n} tokens, ${rate.toFixed(1).replace(".", ",")} tokens/s, primero a los ${first.toFixed(1).replace(".", ",")} s`,
    long: "Eso ya no cabe en el modelo. Empieza un chat nuevo o pide menos.",
    failed: (why) => `No se pudo cargar el modelo: ${why}. Un Chrome, Edge o Firefox actual puede ejecutarlo.`,
    missing: (file) => `El archivo ${file} falta aquí o no está completo. Vuelve a copiar la carpeta.`,
    broke: (why) => `La respuesta se cortó: ${why}`, other: "English", code: "EN",
  },
};
const THOUGHT = /^[\s\S]*<\/(?:think|thinking|thought|reasoning|seed:think)>\s*/;
const MEASURED = "Explain in three sentences how a pot still makes spirit.";
const $ = (id) => document.getElementById(id);

let language = (navigator.language || "en").toLowerCase().startsWith("es") ? "es" : "en";
let config = null, model = null, running = null, state = "loading", measured = null;
let turns = []; // a new list when a new chat begins

const words = () => WORDS[language];
function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.max(1, Math.round(bytes / 1e6))} MB`;
}

/** The prompt of a conversation, as it was written in training; control tokens go by private names. */
export function promptOf(messages) {
  const pieces = config.pieces;
  const system = messages.filter((message) => message.role === "system");
  const said = messages.filter((message) => message.role !== "system");
  let asked = said.filter((message) => message.role === "user").length;
  const opening = asked === 1 ? pieces.alone : pieces.several;
  let text = opening.bare;
  if (system.length && opening.system) {
    const shown = plain(system[0].content);
    text = opening.system[0] + (pieces.trims_system ? shown.trim() : shown) + opening.system[1];
  }
  for (const turn of said) {
    const answer = turn.role === "assistant";
    if (!answer) asked -= 1;
    let content = plain(turn.content);
    if (answer && pieces.forgets_thoughts) content = content.replace(THOUGHT, "");
    if (pieces.trims) content = content.trim();
    text += content + (answer ? (asked === 1 ? pieces.last : pieces.again) : asked ? pieces.answered : pieces.closing);
  }
  return text;
}

/** Text in which nothing can be a control token: their private names are no writing of people. */
function plain(text) {
  const [first, end] = config.private.map((sign) => sign.codePointAt(0));
  const kept = Array.from(text).filter((sign) => sign.codePointAt(0) < first || sign.codePointAt(0) >= end).join("");
  return config.composes ? kept.normalize("NFC") : kept;
}

function show(role, text) {
  $("welcome").hidden = true;
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}

function translate() {
  const w = words();
  document.documentElement.lang = language;
  $("hello").textContent = w.hello;
  if (WORDS.en[state]) $("state").textContent = w[state];
  $("question-label").textContent = w.question;
  $("question").placeholder = w.placeholder;
  $("send").textContent = running ? w.stop : w.send;
  $("again").textContent = w.again;
  $("remember-label").textContent = w.remember;
  $("language").textContent = w.code;
  $("language").setAttribute("aria-label", w.other);
  if (config) $("facts").textContent = w.facts(config);
  $("speed").textContent = measured ? w.speed(...measured) : "";
}

class Missing extends Error {}

/** A file of this folder. */
async function file(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Missing(name);
  return answer;
}

async function modelBlob() {
  const answer = await file("model.bin");
  const parts = [], reader = answer.body.getReader();
  $("bar").hidden = false;
  for (let have = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    have += value.length;
    $("done").style.width = `${Math.min(100, (100 * have) / config.bytes)}%`;
  }
  const blob = new Blob(parts);
  if (blob.size !== config.bytes) throw new Missing("model.bin"); // llama.cpp would answer nonsense from half a file
  return blob;
}

async function load() {
  try {
    const began = performance.now();
    config = await (await file("model.json")).json();
    $("name").textContent = document.title = config.name;
    $("remember").checked = config.remember;
    translate();
    const blob = await modelBlob();
    state = "preparing";
    translate();
    model = new Wllama({ default: "wllama.wasm" }, { logger: LoggerWithoutDebug, suppressNativeLog: true });
    model.setCompat(null); // its other build lies on a server elsewhere
    await model.loadModel([blob], { n_threads: 1, n_gpu_layers: 0, n_ctx: config.positions, n_parallel: 1, warmup: false });
    document.body.dataset.loadedMs = Math.round(performance.now() - began);
    const count = Number(new URLSearchParams(location.search).get("measure"));
    if (Number.isInteger(count) && count > 1) await measure(count);
    state = "ready";
    $("bar").hidden = true;
    $("question").disabled = $("send").disabled = false;
    if (matchMedia("(hover: hover)").matches) $("question").focus(); // on a phone its keyboard would cover the page
  } catch (error) {
    state = "";
    $("bar").hidden = true;
    const why = error.message || error;
    $("state").textContent = error instanceof Missing ? words().missing(why) : words().failed(why);
    document.body.dataset.failed = $("state").textContent;
  }
  translate();
}

/**
 * How fast this browser is, for ?measure=64: exactly so many tokens after a question, over any end of an answer. Each is the
 * letter a, whatever the model would say, because tokens that make no text of their own are not heard of when they come.
 */
async function measure(count) {
  state = "measuring";
  translate();
  const began = performance.now(), seen = [];
  let prompt = 0;
  await model.createCompletion({
    prompt: promptOf([{ role: "user", content: MEASURED }]), stream: true, temperature: 0, max_tokens: count,
    ignore_eos: true, logit_bias: [["a", 1e6]], timings_per_token: true,
    onData: ({ timings }) => {
      if (!timings?.predicted_n) return;
      prompt = timings.prompt_n;
      seen.push([timings.predicted_n, performance.now()]);
    },
  });
  const [first, last] = [seen[0], seen.at(-1)];
  if (!first || last[0] <= first[0] || last[1] <= first[1]) throw new Error("too few tokens to measure"); // clocks are coarse
  const rate = (1000 * (last[0] - first[0])) / (last[1] - first[1]), wait = (first[1] - began) / 1000;
  measured = [last[0], rate, wait];
  document.body.dataset.measured = JSON.stringify({ tokens: last[0], tokens_per_s: rate, first_s: wait, prompt });
}

async function answer(question) {
  const talk = turns;
  const earlier = $("remember").checked ? talk : [];
  const asked = [...earlier, { role: "user", content: question }];
  show("user", question);
  const bubble = show("assistant", "");
  bubble.classList.add("busy");
  running = new AbortController();
  measured = null;
  translate();
  const began = performance.now();
  let text = "", first = 0, reason = "";
  try {
    await model.createCompletion({
      prompt: promptOf(asked), stream: true, temperature: 0, max_tokens: config.positions, abortSignal: running.signal,
      timings_per_token: true, // pieces of text are fewer than tokens, of which several make one letter
      onData: (chunk) => {
        const piece = chunk.choices[0]?.text ?? "";
        if (!first) first = performance.now();
        text += piece;
        reason = chunk.choices[0]?.finish_reason || reason;
        const follows = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
        bubble.textContent = text;
        if (follows) $("log").scrollTop = $("log").scrollHeight;
        const timings = chunk.timings;
        if (timings?.predicted_n > 1) measured = [timings.predicted_n, timings.predicted_per_second, (first - began) / 1000];
        if (measured) $("speed").textContent = words().speed(...measured);
      },
    });
  } catch (error) {
    if (running.signal.aborted) reason = "stopped";
    // the library's word for a last message that is no UTF-8: the model was cut, or ended, within a letter
    else if (text && /typed array length/i.test(error.message)) reason = "length";
    else {
      const long = /context|exceed|kv_cache|too l/i.test(`${error.type} ${error.message}`);
      show("error", long ? words().long : words().broke(error.message || error));
      reason = "broke";
    }
  }
  bubble.classList.remove("busy");
  if (running.signal.aborted || reason === "length") {
    const left = document.createElement("span");
    left.className = "left";
    left.textContent = running.signal.aborted ? words().stopped : words().cut;
    bubble.append(left);
  }
  if (!text && reason === "broke") bubble.remove();
  if (text.trim() || !["broke", "stopped"].includes(reason)) // what was said of nothing is no turn
    talk.push({ role: "user", content: question }, { role: "assistant", content: text.trim() });
  running = null;
  $("again").hidden = turns.length === 0;
  document.body.dataset.answers = Number(document.body.dataset.answers || 0) + 1;
  document.body.dataset.tokensPerSecond = measured ? measured[1].toFixed(1) : "";
  translate();
}

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const question = $("question").value;
  if (!question.trim()) return;
  $("question").value = "";
  grow();
  answer(question);
});
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});
$("again").addEventListener("click", () => {
  if (running) running.abort();
  turns = [];
  measured = null;
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("welcome").hidden = false;
  $("again").hidden = true;
  translate();
});
$("language").addEventListener("click", () => {
  language = language === "en" ? "es" : "en";
  translate();
});
translate();
load();
window.potstill = { promptOf };
