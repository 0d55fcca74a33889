// The rater's page. Shows what the server sends and sends what the rater chooses; knows nothing of items or models.
"use strict";

const RETRY_MS = [300, 800, 2000, 4000];
const home = location.pathname.replace(/\/+$/, "");
const pendingKey = `pending:${home}`;
const byId = (id) => document.getElementById(id);
const buttons = () => document.querySelectorAll("#bar button");
let task = null;
let canUndo = false;
let busy = true;

// One name per act, so that the server knows a repetition. (randomUUID is missing on plain http beyond localhost.)
function newRequestId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function say(text) {
  byId("notice").textContent = text || "";
  byId("notice").hidden = !text;
}

function setBusy(value) {
  busy = value;
  document.body.setAttribute("aria-busy", String(value));
  for (const button of buttons()) button.disabled = value || !(button.id === "undo" ? canUndo : task);
}

function show(view) {
  task = view.task;
  canUndo = view.can_undo;
  const total = view.done + view.remaining;
  byId("progress").max = Math.max(total, 1);
  byId("progress").value = total ? view.done : 1;
  byId("progress-text").textContent = `${view.done} of ${total}`;
  byId("pair").hidden = !task;
  byId("done").hidden = Boolean(task);
  byId("bar").hidden = !task && !canUndo;
  byId("bar").classList.toggle("finished", !task);
  byId("note").value = "";
  if (task) {
    // The server has escaped whatever models wrote; the page's policy runs no script but its own files.
    for (const part of ["prompt", "left", "right"]) byId(part).innerHTML = view[part];
    for (const part of ["left", "right"]) byId(part).scrollTop = 0;
    window.scrollTo(0, 0);
  }
  document.body.dataset.task = task || "";
  document.body.dataset.done = String(view.done);
}

// Sends until the server has answered: an act is stored before it is sent, so a reload or a dead server loses nothing.
async function send(act, body) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      const response = await fetch(`${home}/${act}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        cache: "no-store",
        credentials: "omit",
      });
      if (response.status < 500) return { status: response.status, view: await response.json() };
    } catch (error) {
      if (!(error instanceof TypeError) && !(error instanceof SyntaxError)) throw error;
    }
    say("The server does not answer. Your choice is kept and sent again…");
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)]));
  }
}

async function perform(act, body) {
  setBusy(true);
  if (act !== "next") sessionStorage.setItem(pendingKey, JSON.stringify({ act, body }));
  const { status, view } = await send(act, body);
  sessionStorage.removeItem(pendingKey);
  if ("can_undo" in view) show(view);
  say(view.notice || (status < 400 ? "" : "The server refused this. Reload the page."));
  setBusy(false);
}

function choose(choice) {
  if (!busy && task) perform("vote", { request_id: newRequestId(), task, choice, note: byId("note").value });
}

function skip() {
  if (!busy && task) perform("skip", { request_id: newRequestId(), task });
}

function undo() {
  if (!busy && canUndo) perform("undo", { request_id: newRequestId() });
}

function toggleHelp() {
  const help = byId("help");
  if (help.open) help.close();
  else help.showModal();
}

function scrollBoth(step) {
  const boxes = [byId("left"), byId("right")];
  if (boxes.some((box) => box.scrollHeight > box.clientHeight + 1)) boxes[0].scrollTop += step, boxes[1].scrollTop += step;
  else window.scrollBy(0, step);
}

// Longer and shorter answers keep the same share read.
function linkScrolling(from, to) {
  from.addEventListener("scroll", () => {
    if (from.dataset.follows) {
      delete from.dataset.follows;
      return;
    }
    const room = from.scrollHeight - from.clientHeight;
    const wanted = room > 0 ? Math.round((from.scrollTop / room) * (to.scrollHeight - to.clientHeight)) : 0;
    if (room > 0 && Math.abs(to.scrollTop - wanted) > 1) {
      to.dataset.follows = "1";
      to.scrollTop = wanted;
    }
  }, { passive: true });
}

const KEYS = {
  ArrowLeft: () => choose("left"),
  ArrowRight: () => choose("right"),
  t: () => choose("tie"),
  b: () => choose("both_bad"),
  u: undo,
  s: skip,
  n: () => byId("note").focus(),
  ArrowUp: () => scrollBoth(-80),
  ArrowDown: () => scrollBoth(80),
  "?": toggleHelp,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const note = byId("note");
  if (event.target === note) {
    if (event.key === "Escape" || event.key === "Enter") note.blur(), event.preventDefault();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = KEYS[key];
  if (!act || (byId("help").open && key !== "?")) return;
  event.preventDefault();
  // A key held down must not vote on pairs nobody has seen.
  if (!event.repeat || key === "ArrowUp" || key === "ArrowDown") act();
});

document.addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => choose(button.dataset.choice));
  }
  byId("undo").addEventListener("click", undo);
  byId("skip").addEventListener("click", skip);
  byId("help-button").addEventListener("click", toggleHelp);
  byId("help-close").addEventListener("click", toggleHelp);
  linkScrolling(byId("left"), byId("right"));
  linkScrolling(byId("right"), byId("left"));
  const pending = sessionStorage.getItem(pendingKey);
  const { act, body } = pending ? JSON.parse(pending) : { act: "next", body: {} };
  perform(act, body);
});
