() => {
  // Enter draws; in a box of several lines, gradio would begin a new line. While a character is
  // being composed, Enter belongs to the input method.
  document.querySelectorAll(".enter-draws :is(textarea, input)").forEach((box) =>
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault();
        event.stopPropagation();
        document.querySelector("#generate").click();
      }
    }, true));
  // Screen readers read changes of these aloud.
  document.querySelectorAll("#status, .length").forEach((one) => one.setAttribute("role", "status"));
}
