// The owner's page: excludes raters, makes links. Everything else on it is plain HTML.
"use strict";

const home = location.pathname.replace(/\/+$/, "");

async function post(act, body) {
  const response = await fetch(`${home}/${act}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    credentials: "omit",
  });
  const answer = await response.json();
  if (response.ok) return answer;
  const notice = document.getElementById("notice");
  notice.textContent = answer.notice || "The server refused this.";
  notice.hidden = false;
  return null;
}

function newRequestId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

document.addEventListener("DOMContentLoaded", () => {
  for (const link of document.querySelectorAll("[data-file]")) link.href = `${home}/files/${link.dataset.file}`;
  for (const button of document.querySelectorAll("[data-rater]")) {
    button.addEventListener("click", async () => {
      const excluded = button.dataset.exclude === "true";
      if (await post("exclude", { request_id: newRequestId(), rater: button.dataset.rater, excluded })) location.reload();
    });
  }
  document.getElementById("invite").addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await post("invite", { rater: new FormData(event.target).get("rater").trim() });
    if (answer) document.getElementById("invitation").textContent = new URL(`../${answer.path}`, location.href).href;
  });
});
