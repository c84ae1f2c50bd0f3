() => {
  // In a box of several lines, gradio takes Enter for a new line. Enter that ends the input of a
  // character (isComposing) stays with the input method.
  document.querySelectorAll(".enter-draws :is(textarea, input)").forEach((box) =>
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        event.stopPropagation();
        document.querySelector("#generate").click();
      }
    }, true));
  // Screen readers say what changes there.
  document.querySelectorAll("#status, .length").forEach((one) => one.setAttribute("role", "status"));
}
