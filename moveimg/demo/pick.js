// Choosing an image of the gallery.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-pick]");
  if (!button) return;
  element.querySelectorAll(".chosen").forEach((tile) => tile.classList.remove("chosen"));
  button.closest(".tile").classList.add("chosen");
  trigger("pick", { index: Number(button.dataset.pick) });
});
