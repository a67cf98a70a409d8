// Browsers load no modules from a file: the page says so, because page.js will never run.
if (location.protocol === "file:") {
  document.getElementById("name").textContent = "potstill";
  document.getElementById("state").textContent =
    "Serve this folder, then open http://127.0.0.1:8000 – Sirve esta carpeta y abre http://127.0.0.1:8000 – " +
    "python -m http.server --bind 127.0.0.1";
}
