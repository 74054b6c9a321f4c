// Keys and downloads. All other behaviour is decided on the server.
() => {
  const isShown = (element) => element.offsetParent !== null;
  const findShown = (selector) => [...document.querySelectorAll(selector)].find(isShown);

  // Enter draws, Escape stops.
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.key === "Escape") {
      findShown(".halt")?.click();
    } else if (event.key === "Enter" && !event.isComposing) {
      const isField = target.matches?.(".form input:not([type=checkbox], [type=file])") || target === document.body;
      const isChoosing = target.getAttribute?.("aria-expanded") === "true" && target.value.trim();
      if (isField && !isChoosing) {
        setTimeout(() => findShown(".go")?.click(), 50); // after the field has sent its value
      }
    }
  }, true);

  // Typing into the field for a class replaces the text there.
  document.addEventListener("focusin", (event) => {
    if (event.target.matches?.(".klass input, #model input")) event.target.select();
  });

  // A save link gets the address of its tile's image; Enter and space on the link are a click.
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
}
