// Keys, downloads, and what a press shows before the server answers. Everything else is decided on
// the server.
() => {
  const find = (selector) => document.querySelector(selector);
  const isShown = (element) => element && element.offsetParent !== null;
  const scroll = (selector, block) => find(selector)?.scrollIntoView({ behavior: "smooth", block });
  let pressed = null; // the status line of a press, and its text until the server answers
  let awaited = null; // what to scroll to when it has arrived

  // Enter draws, Escape stops. Without a class, gradio would choose the first one of the list.
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    const findShown = (selector) => [...document.querySelectorAll(selector)].find(isShown);
    if (event.key === "Escape") {
      findShown(".halt")?.click();
    } else if (event.key === "Enter" && !event.isComposing) {
      const isField = target.matches?.(".form input:not([type=checkbox], [type=file])") || target === document.body;
      const isEmpty = target.matches?.(".klass input") && !target.value.trim();
      const isChoosing = target.getAttribute?.("aria-expanded") === "true" && !isEmpty;
      if (isEmpty) {
        event.stopImmediatePropagation();
        target.blur();
      }
      if (isField && !isChoosing && findShown(".go")) {
        setTimeout(() => findShown(".go")?.click(), 50); // the field first hands its value over
      }
    }
  }, true);

  // Typing into the class replaces its text.
  document.addEventListener("focusin", (event) => {
    if (event.target.matches?.(".klass input, #model input")) event.target.select();
  });

  // A press shows "Sending" at once and scrolls to where its result will appear.
  const presses = [ // what is pressed, its status line, and the result to scroll to
    ["#generate, #surprise, #again, #vary, #compare, #save-all", "#status", null],
    ["[data-pick], #kind input", "#memory-status", "#maps"],
    ["#bank-off input", "#memory-status", "#pair"],
    ["#edit", "#edit-status", "#versions"],
    ["#score-upload", "#score-status", "#score-result"],
    ["#reconstruct-upload", "#reconstruct-status", "#reconstruct-result"],
  ];
  const press = (event) => {
    const isUpload = event.type === "taken";
    const found = presses.find(([what]) => what.endsWith("upload") === isUpload && event.target.closest?.(what));
    if (!found) return;
    release();
    const element = find(found[1]);
    pressed = { element, text: element.textContent };
    awaited = found[2];
    element.dataset.pressed = "";
    scroll(found[1], awaited ? "center" : "nearest");
  };
  const release = () => {
    delete pressed?.element.dataset.pressed;
    pressed = null;
  };
  document.addEventListener("click", press, true);
  document.addEventListener("taken", press);
  new MutationObserver((changes) => {
    if (pressed && pressed.element.textContent !== pressed.text) release();
    for (const { target } of changes) {
      const element = target.nodeType === Node.TEXT_NODE ? target.parentElement : target;
      if (awaited && element?.closest(awaited) && find(`${awaited} .tile`)) {
        scroll(awaited, awaited === "#versions" ? "nearest" : "start");
        awaited = null;
      }
    }
    nameServer();
  }).observe(document.body, { childList: true, characterData: true, subtree: true });

  // A link for saving takes the image beside it; pressing a key on it is a click.
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
  function nameServer() {
    document.querySelectorAll("#api code").forEach((code) => {
      const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const node = walker.currentNode;
        if (location.origin !== "http://127.0.0.1:7860" && node.data.includes("http://127.0.0.1:7860")) {
          node.data = node.data.replaceAll("http://127.0.0.1:7860", location.origin);
        }
      }
    });
  }
}
