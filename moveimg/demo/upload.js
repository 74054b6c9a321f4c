// A field for one image: chosen, dropped, pasted, or drawn in another tab. It goes to the server as a
// data URI, or to paint.js, which replaces `take`.
const most = Number(props.most);
let take = (data) => trigger("upload", { data });
const complain = (problem) => { element.querySelector(".upload span").dataset.problem = problem; };
const send = (file) => {
  if (!file) return;
  if (file.size > most) {
    complain(`the file is larger than ${Math.floor(most / 2 ** 20)} MB`);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { complain(""); take(reader.result); };
  reader.onerror = () => complain("the file cannot be read");
  reader.readAsDataURL(file);
};
element.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  send(event.target.files[0]);
  event.target.value = "";
});
element.addEventListener("click", (event) => {
  const button = event.target.closest(".drawn button");
  if (!button) return;
  take(button.firstChild.src);
  trigger("select", { label: Number(button.dataset.label) });
});
element.addEventListener("dragover", (event) => { event.preventDefault(); element.classList.add("over"); });
element.addEventListener("dragleave", () => element.classList.remove("over"));
element.addEventListener("drop", (event) => {
  event.preventDefault();
  element.classList.remove("over");
  send(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (element.offsetParent !== null && event.clipboardData.files[0]) send(event.clipboardData.files[0]);
});
// Whenever the field comes into view, it offers the finished images of the page.
new IntersectionObserver(() => {
  const images = [...document.querySelectorAll(":is(#gallery, #versions) .tile:has(.save) img")];
  element.querySelector(".drawn").replaceChildren(...images.map((image) => {
    const button = document.createElement("button");
    button.type = "button";
    button.ariaLabel = `take ${image.alt}`;
    button.dataset.label = parseInt(image.closest(".tile").querySelector(".save").download, 10);
    button.append(image.cloneNode());
    return button;
  }));
}).observe(element);
