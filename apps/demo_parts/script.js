// Keys, files and downloads. Everything a click decides is decided on the server.
() => {
  const find = (selector) => document.querySelector(selector);
  const shown = (element) => element && element.offsetParent !== null;

  // Enter draws, Escape stops.
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.key === "Escape" && shown(find("#stop"))) {
      find("#stop").click();
    } else if (event.key === "Enter" && !event.isComposing) {
      const field = target.matches?.("#form input:not([type=checkbox])") || target === document.body;
      const choosing = target.getAttribute?.("aria-expanded") === "true";
      if (field && !choosing && shown(find("#generate"))) {
        setTimeout(() => find("#generate").click(), 50); // the field first hands its value over
      }
    }
  }, true);

  // Typing into the class replaces what stands there.
  document.addEventListener("focusin", (event) => {
    if (event.target.matches?.("#klass input, #model input")) event.target.select();
  });

  // A link for saving takes the picture beside it; pressing a key on it is a click.
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a.save");
    if (link) link.href = link.closest(".tile").querySelector("img").src;
  }, true);
  document.addEventListener("keydown", (event) => {
    if (event.target.matches?.("a.save") && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      event.target.click();
    }
  });

  // The examples of the API name this server.
  const name = () => document.querySelectorAll("#api code").forEach((code) => {
    const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (node.data.includes("http://127.0.0.1:7860")) {
        node.data = node.data.replaceAll("http://127.0.0.1:7860", location.origin);
      }
    }
  });
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
