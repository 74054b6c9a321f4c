// A field for one image: chosen, dropped, pasted, or drawn in another tab. The image goes to the server
// as a data URI, or to paint.js, which replaces `useImage`.
const maxBytes = Number(props.most);
let useImage = (data) => trigger("upload", { data });
const showProblem = (problem) => { element.querySelector(".upload span").dataset.problem = problem; };
const readFile = (file) => {
  if (!file) return;
  if (file.size > maxBytes) {
    showProblem(`the file is larger than ${Math.floor(maxBytes / 2 ** 20)} MB`);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { showProblem(""); useImage(reader.result); };
  reader.onerror = () => showProblem("the file cannot be read");
  reader.readAsDataURL(file);
};
element.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  readFile(event.target.files[0]);
  event.target.value = "";
});
element.addEventListener("click", (event) => {
  const button = event.target.closest(".drawn button");
  if (!button) return;
  useImage(button.firstChild.src);
  trigger("select", { label: Number(button.dataset.label) });
});
element.addEventListener("dragover", (event) => { event.preventDefault(); element.classList.add("over"); });
element.addEventListener("dragleave", () => element.classList.remove("over"));
element.addEventListener("drop", (event) => {
  event.preventDefault();
  element.classList.remove("over");
  readFile(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (element.offsetParent !== null && event.clipboardData.files[0]) readFile(event.clipboardData.files[0]);
});
// Whenever the field comes into view, it shows the finished images of the page as choices.
new IntersectionObserver(() => {
  const images = [...document.querySelectorAll(":is(#gallery, #versions) .tile:has(.save) img")];
  element.querySelector(".drawn").replaceChildren(...images.map((image) => {
    const button = document.createElement("button");
    button.type = "button";
    button.ariaLabel = `use ${image.alt}`;
    button.dataset.label = parseInt(image.closest(".tile").querySelector(".save").download, 10);
    button.append(image.cloneNode());
    return button;
  }));
}).observe(element);
